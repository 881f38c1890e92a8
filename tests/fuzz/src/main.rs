//! The fuzz target that the environment variable `COWL_FUZZ` names.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("COWL_FUZZ").unwrap_or_default();
    match name.as_str() {
        "acl" => cowl::archive::fuzzing::acl,
        "lxc_config" => cowl::lxc::fuzzing::lxc_config,
        "manifests" => cowl::store::fuzzing::manifests,
        "markers" => cowl_layers::fuzzing::markers,
        "options" => cowlfs::cli::fuzzing::options,
        "pax" => cowl::archive::fuzzing::pax,
        "tar" => cowl::archive::fuzzing::tar,
        "unpack" => cowl::archive::fuzzing::unpack,
        _ => panic!("COWL_FUZZ={name}: no such target"),
    }
});

fuzz_target!(|data: &[u8]| TARGET(data));
