//! Registries of container images, over the HTTP API of the OCI distribution specification.
//!
//! Everything that a registry sends is untrusted: each answer is limited before it is read, text for people is shortened
//! (and escaped where it is printed), a redirect never leads from https to http, and credentials are sent only to the
//! registry and to its token server. docs/decisions/0047 explains the choices.

mod answer;
mod auth_file;
mod challenge;
mod client;
mod credentials;
mod downloads;
mod login;
mod manifests;
mod pace;
mod parallel;
mod patience;
mod reference;
mod source;
mod tag;
mod transport;
mod trust;
mod uploads;

pub use auth_file::AuthFiles;
pub use client::{Access, Client};
pub use credentials::Credential;
pub use login::{log_in, log_out};
pub use parallel::Queue;
pub use reference::{RegistryName, RegistryRef};
pub use source::{Downloaded, RegistryImage};
pub use tag::Overwrite;
pub use transport::Connection;
pub use trust::{TlsVerify, Trust};
pub use uploads::{BlobFile, Found, Push, PushReport};
