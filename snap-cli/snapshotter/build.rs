//! Generates the server of containerd's snapshots service. The messages are in `src/messages.rs`.

use tonic_build::manual::{Builder, Method, Service};

const MESSAGES: &str = "crate::messages";

fn main() {
    let method = |name: &str, route: &str, input: &str, output: &str| {
        Method::builder()
            .name(name)
            .route_name(route)
            .input_type(format!("{MESSAGES}::{input}"))
            .output_type(format!("{MESSAGES}::{output}"))
            .codec_path("tonic_prost::ProstCodec")
    };
    let service = Service::builder()
        .name("Snapshots")
        .package("containerd.services.snapshots.v1")
        .method(method("prepare", "Prepare", "PrepareRequest", "MountList").build())
        .method(method("view", "View", "PrepareRequest", "MountList").build())
        .method(method("mounts", "Mounts", "KeyRequest", "MountList").build())
        .method(method("commit", "Commit", "CommitRequest", "Empty").build())
        .method(method("remove", "Remove", "KeyRequest", "Empty").build())
        .method(method("stat", "Stat", "KeyRequest", "InfoReply").build())
        .method(method("update", "Update", "UpdateRequest", "InfoReply").build())
        .method(
            method("list", "List", "ListRequest", "InfoList")
                .server_streaming()
                .build(),
        )
        .method(method("usage", "Usage", "KeyRequest", "UsageReply").build())
        .method(method("cleanup", "Cleanup", "CleanupRequest", "Empty").build())
        .build();
    Builder::new().build_client(false).compile(&[service]);
}
