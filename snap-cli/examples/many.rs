//! Writes a store with many snapshots or many containers, to measure lists on:
//! `cargo run --release -p cowl --example many -- DIR CONTAINERS SNAPSHOTS`.
//! (docs/upkeep.md has the figures.)
#![allow(clippy::unwrap_used, reason = "a tool for measuring")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use cowl::store::creation::Creation;
use cowl::store::manifest::{
    ContainerManifest, LayerId, LayerKind, SnapshotId, SnapshotKind, SnapshotManifest, SnapshotRef,
};
use cowl::store::name::{ContainerName, SnapshotName};
use cowl::store::record::Record;
use cowl::store::{Session, Store, disk, now};
use serde_json::Map;

/// Stacks are kept below the limit that containers are flattened at.
const DEPTH: usize = 100;

fn main() {
    let mut args = std::env::args_os().skip(1);
    let root = PathBuf::from(args.next().unwrap());
    let mut number = || {
        args.next()
            .unwrap()
            .into_string()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let (containers, snapshots) = (number(), number());
    let session = Session {
        command: "many".to_owned(),
        patience: Duration::from_secs(5),
        mounts: Default::default(),
        program: None,
    };
    let store = Store::open_or_make(&root, session).unwrap();
    let mut creation = Creation::begin(&store).unwrap();
    let base = creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
    std::fs::write(store.paths().layer_tree(base).join("file"), "content").unwrap();
    for container in 0..containers {
        write(
            &store,
            &mut creation,
            base,
            &format!("c{container}"),
            snapshots,
        );
    }
    creation.finish().unwrap();
}

fn write(store: &Store, creation: &mut Creation<'_>, base: LayerId, name: &str, snapshots: u64) {
    let id = creation.create_container().unwrap();
    let mut list: Vec<SnapshotRef> = Vec::new();
    let mut stack = vec![base];
    for number in 0..snapshots {
        let layer = creation
            .create_layer(LayerKind::Delta, &stack, &[])
            .unwrap();
        std::fs::write(
            store.paths().layer_tree(layer).join("file"),
            number.to_string(),
        )
        .unwrap();
        stack.insert(0, layer);
        if stack.len() > DEPTH {
            stack.remove(DEPTH - 1);
        }
        let snapshot = SnapshotId::fresh();
        let state = SnapshotManifest {
            stack: stack.clone(),
            settings: Map::new(),
            config: None,
            received_config: None,
            extra: Map::new(),
        };
        disk::write_new(
            &store.paths().snapshot_file(id, snapshot),
            &Record::first(state),
        )
        .unwrap();
        list.push(SnapshotRef {
            id: snapshot,
            name: SnapshotName::counted(number),
            kind: SnapshotKind::Scheduled,
            created: now(),
            parent: list.last().map(|last| last.id),
            layer,
            comment: format!("number {number}"),
            tags: BTreeMap::new(),
            protected: false,
            settling: None,
            extra: Map::new(),
        });
    }
    let head = creation
        .create_layer(LayerKind::Delta, &stack, &[])
        .unwrap();
    let origin = vec![base];
    stack.insert(0, head);
    let manifest = ContainerManifest {
        stack,
        origin,
        parent: list.last().map(|last| last.id),
        snapshots: list,
        next_snap: snapshots,
        ..ContainerManifest::new(ContainerName::parse(name).unwrap(), head, &[])
    };
    disk::replace(&store.paths().container_file(id), &Record::first(manifest)).unwrap();
}
