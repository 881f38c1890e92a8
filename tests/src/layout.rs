//! Writes a store directly, following docs/format.md, so that a container can consist of arbitrary layers. This also
//! tests that the page is sufficient for another implementation.

use std::fs::DirBuilder;
use std::io::Result;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::tree::hex;

const CREATED: &str = "2026-01-02T03:04:05Z";

/// Creates a store at `root` with one container over `lowers` (topmost first), which are moved into the store. With
/// `base`, the lowest layer is a base, which is never merged with others.
pub fn make(root: &Path, container: &str, lowers: &[PathBuf], base: bool) -> Result<()> {
    for (directory, mode) in [
        ("", 0o755),
        ("layers", 0o700),
        ("containers", 0o700),
        ("mnt", 0o700),
        ("run", 0o700),
        ("locks", 0o700),
        ("trash", 0o700),
    ] {
        DirBuilder::new().mode(mode).create(root.join(directory))?;
    }
    write(
        &root.join("store.json"),
        json!({ "uuid": id(), "marks": "trusted" }),
    )?;
    let mut over: Vec<String> = Vec::new();
    for (index, lower) in lowers.iter().rev().enumerate() {
        let kind = if index == 0 && base { "base" } else { "delta" };
        let layer = layer(root, kind, &over)?;
        std::fs::rename(lower, root.join("layers").join(&layer).join("tree"))?;
        over.insert(0, layer);
    }
    let head = layer(root, "delta", &over)?;
    let tree = |id: &str| root.join("layers").join(id).join("tree");
    DirBuilder::new().mode(0o700).create(tree(&head))?;
    if let Some(top) = over.first() {
        crate::layers::copy_root(&tree(top), &tree(&head))?;
    }
    let directory = root.join("containers").join(id());
    DirBuilder::new().mode(0o700).create(&directory)?;
    DirBuilder::new()
        .mode(0o700)
        .create(directory.join("snapshots"))?;
    let stack: Vec<&String> = [&head].into_iter().chain(&over).collect();
    let manifest = json!({
        "name": container,
        "head": head,
        "stack": stack,
        "origin": over,
        "snapshots": [],
        "next_snap": 0,
        "next_auto": 0,
        "created": CREATED,
        "settings": {},
    });
    write(&directory.join("container.json"), manifest)
}

/// Returns the layers of a container, topmost first.
pub fn stack(root: &Path, container: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for directory in std::fs::read_dir(root.join("containers"))? {
        let text = std::fs::read(directory?.path().join("container.json"))?;
        let manifest: Value = serde_json::from_slice(&text)?;
        if manifest["name"] != container {
            continue;
        }
        let ids = manifest["stack"].as_array().into_iter().flatten();
        found.extend(
            ids.filter_map(Value::as_str)
                .map(|id| root.join("layers").join(id).join("tree")),
        );
    }
    Ok(found)
}

fn layer(root: &Path, kind: &str, over: &[String]) -> Result<String> {
    let layer = id();
    let directory = root.join("layers").join(&layer);
    DirBuilder::new().mode(0o700).create(&directory)?;
    DirBuilder::new()
        .mode(0o700)
        .create(directory.join("work"))?;
    let manifest = json!({ "kind": kind, "over": over, "created": CREATED });
    write(&directory.join("layer.json"), manifest)?;
    Ok(layer)
}

fn id() -> String {
    uuid::Uuid::new_v4().hyphenated().to_string()
}

fn write(path: &Path, body: Value) -> Result<()> {
    let mut fields: Map<String, Value> = match body {
        Value::Object(fields) => fields,
        other => panic!("not an object: {other}"),
    };
    fields.insert("format".to_owned(), 1.into());
    fields.insert("generation".to_owned(), 1.into());
    // The checksum requires sorted keys, which a serde_json map guarantees.
    let sum = hex(&Sha256::digest(serde_json::to_vec(&fields)?));
    fields.insert("checksum".to_owned(), format!("sha256:{sum}").into());
    std::fs::write(path, serde_json::to_vec_pretty(&fields)?)
}
