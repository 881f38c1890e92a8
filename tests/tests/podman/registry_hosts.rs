//! A container that travels between two hosts, and the number of bytes on the network.

use cowl_tests::command::{Output, sh_in};
use cowl_tests::conditions::can_mount;
use cowl_tests::cowl::Store;
use cowl_tests::hosts::{self, Host, pair};
use cowl_tests::registry::{self, Protection, Registry};
use cowl_tests::rootfs;

use crate::registry::{assert_equal, described};

/// The bytes of documents, of TLS and of the network, apart from layers.
const OVERHEAD: u64 = 150_000;

/// A host with a store.
struct Machine<'h> {
    host: &'h Host,
    store: Store,
    certificates: String,
}

impl Machine<'_> {
    #[track_caller]
    fn run(&self, args: &[&str]) -> Output {
        let more = ["--cert-dir", &self.certificates];
        let command = self.store.command([args, &more].concat());
        self.host.run_command(&command).ok()
    }

    /// Runs a command and returns the number of bytes that this host has sent and received for it.
    #[track_caller]
    fn bytes_of(&self, args: &[&str]) -> u64 {
        let before = self.host.bytes();
        self.run(args);
        self.host.bytes() - before
    }
}

#[track_caller]
fn assert_between(bytes: u64, layers: u64) {
    let range = layers..layers + layers / 20 + OVERHEAD;
    assert!(range.contains(&bytes), "{bytes} is not in {range:?}");
}

/// The registry and B are on one host, A on the other one. Only new layers are on the network between them.
#[test]
fn only_new_layers_are_on_the_network() {
    if !can_mount(&[hosts::NEEDS, registry::NEEDS].concat()) {
        return;
    }
    let (near, far) = pair();
    let a = Store::for_test();
    let protection = Protection {
        password: false,
        tls: true,
        clients: false,
    };
    let registry = Registry::start_on(&far, &a.beside("registry"), protection);
    let reference = format!("{}/web", registry.name());
    let machine = |host, store| Machine {
        host,
        store,
        certificates: registry.cert_dir().display().to_string(),
    };
    let (a, b) = (machine(&near, a), machine(&far, Store::for_test()));
    a.store.create("web", &rootfs::busybox_tar().unwrap());
    let noise = |machine: &Machine<'_>, name: &str, size: u64| {
        let line = format!("head -c {size} /dev/urandom > /{name}");
        machine.store.exec("web", &line);
    };
    let mut sent = 0;
    for (snapshot, size) in [("one", 3_000_000), ("two", 200_000), ("three", 100_000)] {
        noise(&a, snapshot, size);
        a.store.ok(["snapshot", "web", "-m", snapshot]);
        sent += size;
    }
    let before = stored_bytes(&registry, &a.store);
    assert_eq!(before, 0);
    let bytes = a.bytes_of(&["push", "web", &reference]);
    let base = stored_bytes(&registry, &a.store) - sent;
    assert_between(bytes, base + sent);
    assert!(a.bytes_of(&["push", "web", &reference]) < OVERHEAD);

    b.run(&["pull", &reference]);
    noise(&b, "four", 400_000);
    b.run(&["push", "web", &reference, "-m", "four"]);
    assert_between(a.bytes_of(&["pull", "--update", &reference]), 400_000);
    assert_eq!(described(&a.store, "web"), described(&b.store, "web"));
    assert_eq!(
        a.store.snapshots("web"),
        ["snap0", "snap1", "snap2", "snap3"]
    );
    assert_equal("after the update", (&a.store, "web"), (&b.store, "web"));
    noise(&a, "five", 300_000);
    assert_between(a.bytes_of(&["push", "web", &reference]), 300_000);
}

/// Returns the number of bytes of the layers in the registry.
fn stored_bytes(registry: &Registry, store: &Store) -> u64 {
    let dir = registry.cert_dir().join("../data");
    let script = format!(
        "find {} -name data -size +50k -printf '%s\\n' 2> /dev/null | awk '{{ sum += $1 }} END {{ print sum + 0 }}'",
        dir.display()
    );
    sh_in(store.scratch(), &script).out().parse().unwrap()
}
