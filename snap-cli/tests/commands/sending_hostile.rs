//! Streams for `cowl receive` that `cowl send` does not write.

use std::io::Write as _;

use cowl::store::manifest::LayerId;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::sending::Side;

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Changes the members of an uncompressed stream, and corrects sizes and checksums.
fn change(stream: &[u8], mut edit: impl FnMut(&str, &[u8]) -> Option<Vec<u8>>) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), stream);
    while rest.len() >= 512 {
        let (block, after) = rest.split_at(512);
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes().copy_from_slice(block);
        if block.iter().all(|byte| *byte == 0) {
            out.extend_from_slice(rest);
            return out;
        }
        let size = usize::try_from(header.size().unwrap()).unwrap();
        let data = &after[..size];
        rest = &after[size.next_multiple_of(512)..];
        let path = String::from_utf8(header.path_bytes().into_owned()).unwrap();
        let new = match path.ends_with(".sum") {
            true => Some(format!("sha256:{}\n", hex(&out)).into_bytes()),
            false => edit(&path, data),
        };
        let data = new.as_deref().unwrap_or(data);
        header.set_size(data.len() as u64);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out
}

/// Changes the manifest of a stream, and corrects its checksum.
fn change_manifest(stream: &[u8], edit: impl Fn(&mut Value)) -> Vec<u8> {
    change(stream, |path, data| {
        (path == "cowl-container.json").then(|| {
            let mut manifest: Value = serde_json::from_slice(data).unwrap();
            edit(&mut manifest);
            let object = manifest.as_object_mut().unwrap();
            object.remove("checksum");
            let sum = hex(&serde_json::to_vec(object).unwrap());
            object.insert("checksum".to_owned(), format!("sha256:{sum}").into());
            serde_json::to_vec(object).unwrap()
        })
    })
}

type Edit = fn(&mut Value);

/// Changes of a manifest, each with its description and a part of the error.
const WRONG_MANIFESTS: [(&str, Edit, &str); 11] = [
    (
        "a newer format",
        |m| m["format"] = 9.into(),
        "newer version",
    ),
    (
        "a bad id",
        |m| m["layers"][0]["id"] = "../../x".into(),
        "cannot use the archive",
    ),
    (
        "a layer twice",
        |m| m["layers"][1]["id"] = m["layers"][0]["id"].clone(),
        "twice",
    ),
    (
        "an unused layer",
        |m| {
            let mut layer = m["layers"][0].clone();
            layer["id"] = LayerId::fresh().to_string().into();
            m["layers"].as_array_mut().unwrap().push(layer);
        },
        "not those of its stacks",
    ),
    (
        "a layer that is sent and not sent",
        |m| {
            let id = m["layers"][0]["id"].clone();
            let digest = format!("layer1:{}", "0".repeat(64));
            m["base"] = json!([{ "id": id, "identity": { "id": id, "digest": digest } }]);
        },
        "twice",
    ),
    (
        "a base that this store lacks",
        |m| {
            let layers = m["layers"].as_array_mut().unwrap();
            let id = layers.remove(0)["id"].clone();
            let digest = format!("layer1:{}", "0".repeat(64));
            m["base"] = json!([{ "id": id, "identity": { "id": id, "digest": digest } }]);
        },
        "lacks the layer",
    ),
    (
        "an invalid digest",
        |m| {
            let layers = m["layers"].as_array_mut().unwrap();
            let id = layers.remove(0)["id"].clone();
            m["base"] = json!([{ "id": id, "identity": { "id": id, "digest": "sha256:0" } }]);
        },
        "invalid digest",
    ),
    (
        "a name with a slash",
        |m| m["container"]["snapshots"][0]["name"] = "../x".into(),
        "cannot use the archive",
    ),
    (
        "a name twice",
        |m| m["container"]["snapshots"][0]["name"] = "snap1".into(),
        "twice",
    ),
    (
        "a stack with a layer twice",
        |m| {
            let id = m["container"]["snapshots"][0]["id"]
                .as_str()
                .unwrap()
                .to_owned();
            let stack = m["states"][&id]["stack"].as_array_mut().unwrap();
            let first = stack[0].clone();
            stack.push(first);
        },
        "twice",
    ),
    (
        "a lost field",
        |m| drop(m.as_object_mut().unwrap().remove("states")),
        "states",
    ),
];

#[test]
fn wrong_manifests_are_refused() {
    let a = Side::with_web();
    let stream = a.send(&["web", "--compress", "none"]);
    let b = Side::new();
    // The functions above change nothing else.
    b.receive(&["same"], &change_manifest(&stream, |_| {})).ok();
    b.cli
        .ok(["destroy", "same", "--now", "--yes", "--protected"]);
    for (what, edit, expected) in WRONG_MANIFESTS {
        let output = b.receive(&[], &change_manifest(&stream, edit));
        assert_eq!(output.code, 1, "{what}: {}", output.report());
        assert!(
            output.err().contains(expected),
            "{what}: {}",
            output.report()
        );
        assert!(b.has_no_container(), "{what}");
    }
}

#[test]
fn parents_and_texts_of_a_sender_are_harmless() {
    let a = Side::with_web();
    let stream = a.send(&["web", "--compress", "none"]);
    let b = Side::new();
    let odd = change_manifest(&stream, |manifest| {
        let snapshots = manifest["container"]["snapshots"].as_array_mut().unwrap();
        // Two snapshots are the parents of each other.
        let [first, second] = [0, 1].map(|at| snapshots[at]["id"].clone());
        snapshots[0]["parent"] = second;
        snapshots[1]["parent"] = first;
        snapshots[2]["parent"] = "00000000-0000-4000-8000-000000000000".into();
        snapshots[2]["comment"] = "\u{1b}]0;title\u{7}\u{1b}[2J".into();
        snapshots[2]["created"] = "\u{1b}[2J".into();
        manifest["container"]["created"] = "\u{1b}[2J".into();
        for layer in manifest["layers"].as_array_mut().unwrap() {
            layer["layer"]["created"] = "\u{1b}[2J".into();
        }
        manifest["layers"][0]["layer"]["created"] = "2090-01-01T00:00:00Z".into();
    });
    b.receive(&[], &odd).ok();
    for args in [
        &["list", "web"][..],
        &["show", "web@snap2"],
        &["check"],
        &["rm", "web@snap0", "--yes"],
    ] {
        let output = b.cli.cowl(args);
        assert!(output.code == 0, "{}", output.report());
        assert!(!output.out().contains('\u{1b}') && !output.err().contains('\u{1b}'));
    }
    let shown = b.cli.ok(["show", "web", "--json"]);
    assert!(!shown.contains("[2J"), "{shown}");
    let layers = b.layers();
    assert!(layers.iter().all(|layer| !layer.created.contains('\u{1b}')));
    // The images of the layer must not depend on the clock of this host.
    let future = layers.iter().filter(|l| l.created.starts_with("2090"));
    assert_eq!(future.count(), 1);
}

#[test]
fn digests_are_never_claims() {
    let (a, b) = (Side::with_web(), Side::new());
    let stream = a.send(&["web", "--compress", "none"]);
    // Another content below the name of a layer that the store will receive.
    let changed = change(&stream, |path, data| {
        path.ends_with("etc/file")
            .then(|| [b"ONE", &data[3..]].concat())
    });
    b.receive(&["evil"], &changed)
        .fails(1, &["differs from its digest"]);
    assert!(b.has_no_container());
    let digest = |path: &str, data: &[u8]| {
        path.ends_with(".digest")
            .then(|| [&data[..data.len() - 2], b"\n"].concat())
    };
    b.receive(&["evil"], &change(&stream, digest))
        .fails(1, &["invalid digest"]);
    // The manifest of a layer cannot contain an identity or an image.
    let claims = change_manifest(&stream, |manifest| {
        let id = LayerId::fresh().to_string();
        let identity = json!({ "id": id, "digest": format!("layer1:{}", "1".repeat(64)) });
        for layer in manifest["layers"].as_array_mut().unwrap() {
            layer["layer"]["identity"] = identity.clone();
        }
    });
    b.receive(&["web"], &claims).ok();
    let forged = b.layers().into_iter().filter(|layer| {
        let identity = layer.identity.as_ref();
        identity.is_some_and(|identity| identity.digest.to_string().ends_with("1111"))
    });
    assert_eq!(forged.count(), 0);
    b.cli
        .ok(["destroy", "web", "--now", "--yes", "--protected"]);

    // A hostile sender gives the id of a layer to another content. The digests of the two differ.
    let evil = Side::with_web_of("EVIL");
    let ids: Vec<Value> = {
        let manifest = std::cell::RefCell::new(Value::Null);
        change(&stream, |path, data| {
            if path == "cowl-container.json" {
                manifest.replace(serde_json::from_slice(data).unwrap());
            }
            None
        });
        let manifest = manifest.into_inner();
        manifest["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| layer["id"].clone())
            .collect()
    };
    let poison = change_manifest(&evil.send(&["web", "--compress", "none"]), |manifest| {
        for (layer, id) in manifest["layers"]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .zip(&ids)
        {
            layer["known_as"] = id.clone();
        }
    });
    b.receive(&["evil"], &poison).ok();
    let received = b.receive(&["web", "--json"], &stream).ok().json();
    assert_eq!(received["snapshots"].as_array().unwrap().len(), 3);
    assert_eq!(b.cli.ok(["cat", "evil:etc/file"]), "EVIL");
    assert_eq!(b.cli.ok(["cat", "web:etc/file"]), "one");
    b.cli.ok(["check", "--deep"]);
}

#[test]
fn members_that_do_not_belong_are_refused() {
    let (a, b) = (Side::with_web(), Side::new());
    let stream = a.send(&["web", "--compress", "none"]);
    let renamed = |from: &str, to: &str| {
        let mut changed = stream.clone();
        let (from, to) = (from.as_bytes(), to.as_bytes());
        let mut at = 0;
        while at + 512 <= changed.len() {
            let block = &mut changed[at..at + 512];
            let name: Vec<u8> = block[..100]
                .iter()
                .copied()
                .take_while(|byte| *byte != 0)
                .collect();
            let mut header = tar::Header::new_ustar();
            header.as_mut_bytes().copy_from_slice(block);
            if name.ends_with(from) && header.cksum().is_ok_and(|sum| sum > 0) {
                let start = name.len() - from.len();
                header.as_mut_bytes()[start..100].fill(0);
                header.as_mut_bytes()[start..start + to.len()].copy_from_slice(to);
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
                break;
            }
            let size = header
                .size()
                .map_or(0, |size| usize::try_from(size).unwrap());
            at += 512 + size.next_multiple_of(512);
        }
        change(&changed, |_, _| None)
    };
    for (from, to, expected) in [
        ("etc/file", "etc/../f", "etc/../f"),
        ("etc/file", "etc/large", "two entries"),
        (".digest", ".another", "does not belong"),
    ] {
        let output = b.receive(&[], &renamed(from, to));
        assert_eq!(output.code, 1, "{}", output.report());
        assert!(output.err().contains(expected), "{}", output.report());
        assert!(b.has_no_container());
    }
    b.receive(&[], b"").fails(1, &["nothing was sent"]);
    b.receive(&[], b"no archive at all").fails(1, &[]);
    let plain = cowl_tests::command::sh("tar -c -C / etc/hostname").stdout;
    b.receive(&[], &plain).fails(1, &["cowl import"]);
}

/// The limit on what follows the end of an archive counts before and after it is decoded.
#[test]
fn endless_streams_are_refused() {
    let (a, b) = (Side::with_web(), Side::new());
    // An empty zstd frame: its magic number, and its length.
    let frame = [
        &0x184d_2a50_u32.to_le_bytes()[..],
        &(1_u32 << 20).to_le_bytes(),
    ]
    .concat();
    let frame = [&frame[..], &vec![7; 1 << 20]].concat();
    let zeros = vec![0; 65 << 20];
    let plain = a.send(&["web", "--compress", "none"]);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&plain).unwrap();
    for (compression, stream, rest) in [
        ("gzip", encoder.finish().unwrap(), &zeros),
        ("zstd", a.send(&["web"]), &frame.repeat(65)),
        ("none", plain, &zeros),
    ] {
        b.receive(&[], &[&stream[..], &rest[..]].concat())
            .fails(1, &["bytes follow the end of the archive"]);
        assert!(b.has_no_container(), "{compression}");
        let padded = [&stream[..], &rest[..rest.len() / 65 * 2]].concat();
        b.receive(&["web"], &padded).ok();
        b.cli
            .ok(["destroy", "web", "--now", "--yes", "--protected"]);
    }
}

/// Two layers of a stack must not become one layer, whatever identities they claim.
#[test]
fn layers_with_one_identity_remain_two() {
    let a = Side::new();
    let base = a.cli.beside("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::write(base.join("file"), "x").unwrap();
    a.cli.create("web", &base);
    // Two changes with the same result, except for the time of the root, which is made equal.
    for _ in 0..2 {
        a.write("web", "new", b"same");
        let head = a.json(&["show", "web", "--json"])["head"]
            .as_str()
            .unwrap()
            .to_owned();
        cowl_tests::command::sh(&format!("touch -d @5 {head}/new {head}")).ok();
        a.cli.ok(["snapshot", "--no-sync", "web"]);
    }
    let stream = a.send(&["web", "--compress", "none"]);
    let honest = Side::new();
    honest.receive(&[], &stream).ok();
    assert_eq!(honest.layers().len(), 4, "three layers and a head");
    let claims = change_manifest(&stream, |manifest| {
        let layers = manifest["layers"].as_array_mut().unwrap();
        let id = layers[1]["id"].clone();
        layers[2]["known_as"] = id;
    });
    let b = Side::new();
    b.receive(&[], &claims).ok();
    assert_eq!(b.layers().len(), 4);
    b.cli.ok(["check", "--deep"]);
    b.cli.ok(["cat", "web@snap1:new"]);
    // As a base, the same layer twice is refused.
    let have = honest.cli.ok(["receive", "--have"]);
    let send = ["send", "web", "--compress", "none", "--have", "-"];
    let rest = a.cli.cowl_with(send, have.as_bytes()).ok().stdout;
    let twice = change_manifest(&rest, |manifest| {
        let identity = manifest["base"][1]["identity"].clone();
        manifest["base"][2]["identity"] = identity;
    });
    let output = honest.receive(&["again"], &twice);
    output.fails(1, &["refers to the layer", "twice"]);
    honest.receive(&["again"], &rest).ok();
    honest.cli.ok(["check", "--deep"]);
}

/// LXC runs programs that a config names as root of the host.
#[test]
fn configs_of_a_sender_are_set_apart() {
    let (a, b) = (Side::with_web(), Side::new());
    b.receive(&[], &a.send(&["web@snap0"])).ok();
    let stream = a.send(&["web", "--compress", "none"]);
    let hooked = change_manifest(&stream, |manifest| {
        for state in manifest["states"].as_object_mut().unwrap().values_mut() {
            state["config"] = "lxc.hook.pre-start = /bin/false\n".into();
        }
    });
    b.receive(&["new"], &hooked).ok();
    b.receive(&["web"], &hooked).ok();
    assert_eq!(b.configs("new"), (0, 3));
    // The first snapshot was there already.
    assert_eq!(b.configs("web"), (0, 2));
    b.cli.cowl_with(["import", "-", "imported"], &hooked).ok();
    assert_eq!(b.configs("imported"), (0, 3));
    let shown = b.json(&["show", "web@snap2", "--json"]);
    assert_eq!(
        shown["received_config"],
        "lxc.hook.pre-start = /bin/false\n"
    );
    // They are not trusted because they have made a detour.
    let c = Side::new();
    c.receive(&[], &b.send(&["new", "--compress", "none"])).ok();
    assert_eq!(c.configs("new"), (0, 3));
}

/// Returns a stream of all snapshots of `web`, and a store that has the container with the first one.
fn second_transfer() -> (Vec<u8>, Side) {
    let (a, b) = (Side::with_web(), Side::new());
    b.receive(&[], &a.send(&["web@..snap0"])).ok();
    (a.send(&["web", "--compress", "none"]), b)
}

/// A merge that only the manifest claims would rewrite the stacks of snapshots.
#[test]
fn a_merge_in_a_manifest_is_not_executed() {
    let stream = Side::with_web().send(&["web", "--compress", "none"]);
    let b = Side::new();
    for (name, runs) in [("empty", false), ("all", true)] {
        let odd = change_manifest(&stream, |manifest| {
            let stack = manifest["container"]["stack"].as_array().unwrap().clone();
            let run = if runs { &stack[1..] } else { &[] };
            let layer = LayerId::fresh().to_string();
            manifest["container"]["merged"] = json!({ "run": run, "layer": layer });
        });
        b.receive(&[name], &odd).ok();
        b.cli.ok(["snapshot", "--no-sync", name]);
        b.cli.ok(["cat", &format!("{name}@snap0:etc/file")]);
        b.cli.ok(["check"]);
        b.cli.ok(["destroy", name, "--now", "--yes", "--protected"]);
    }
}

#[test]
fn a_number_of_a_sender_leaves_numbers_for_the_target() {
    let (stream, b) = second_transfer();
    for (at, most) in [(1, "snap"), (2, "auto")] {
        let extreme = format!("{most}{}", u64::MAX - 1);
        let odd = change_manifest(&stream, |manifest| {
            manifest["container"]["snapshots"][at]["name"] = extreme.clone().into();
        });
        b.receive(&["new"], &odd).fails(1, &[&extreme, "larger"]);
        b.receive(&["web"], &odd).ok();
    }
    let counters = change_manifest(&stream, |manifest| {
        manifest["container"]["next_snap"] = u64::MAX.into();
        manifest["container"]["next_auto"] = u64::MAX.into();
    });
    b.receive(&["new"], &counters).ok();
    for name in ["web", "new"] {
        for round in 0..3 {
            b.write(name, "etc/round", format!("{round}").as_bytes());
            b.cli.ok(["snapshot", "--no-sync", name]);
            b.write(name, "etc/round", b"before a restore");
            b.cli.ok(["restore", name, "snap0"]);
        }
        let list = b.json(&["list", name, "--json"]);
        let names = list["snapshots"].as_array().unwrap().iter();
        let names: Vec<_> = names.map(|snapshot| snapshot["name"].to_string()).collect();
        let different: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
        assert!(names.iter().all(|name| name.len() < 20), "{names:?}");
        b.send(&[name]);
    }
}

/// Snapshots from a sender, whose clock may be wrong, must not displace those that were taken here.
#[test]
fn received_snapshots_do_not_change_what_is_pruned() {
    let (stream, b) = second_transfer();
    let own = |b: &Side| {
        let list = b.json(&["list", "web", "--json"]);
        let snapshots = list["snapshots"].as_array().unwrap().iter();
        let own = snapshots.filter(|snapshot| snapshot["kind"] == "scheduled");
        own.count()
    };
    for round in 0..2 {
        b.write("web", "etc/own", format!("{round}").as_bytes());
        b.cli.ok(["snapshot", "--no-sync", "--scheduled", "web"]);
    }
    let future = change_manifest(&stream, |manifest| {
        for snapshot in manifest["container"]["snapshots"].as_array_mut().unwrap() {
            snapshot["kind"] = "scheduled".into();
            snapshot["created"] = "2090-01-01T00:00:00Z".into();
            snapshot["protected"] = false.into();
        }
        let rules = json!({ "last": 1, "manual": true, "protected": true });
        manifest["container"]["settings"]["prune"] = rules;
    });
    b.receive(&[], &future).ok();
    assert_eq!(own(&b), 2);
    b.cli.ok(["prune", "web", "--keep-last", "2"]);
    assert_eq!(own(&b), 2);
    // A new container has no rules of the sender, and no times after its arrival.
    b.receive(&["new"], &future).ok();
    let list = b.cli.ok(["list", "new", "--json"]);
    assert!(!list.contains("2090-"), "{list}");
    let show = b.cli.ok(["show", "new", "--json"]);
    assert!(!show.contains("prune"), "{show}");
    assert_eq!(b.cli.cowl(["prune", "new"]).code, 2);
}

/// A snapshot with the same id and another content is not a copy.
#[test]
fn another_content_of_a_known_snapshot_is_a_failure() {
    let (a, b) = (Side::with_web(), Side::new());
    let stream = a.send(&["web", "--compress", "none"]);
    let poison = change_manifest(&stream, |manifest| {
        let ids: Vec<String> = [0, 2]
            .map(|at| manifest["container"]["snapshots"][at]["id"].clone())
            .map(|id| id.as_str().unwrap().to_owned())
            .into();
        // The first snapshot has the content of the last one.
        manifest["states"][&ids[0]] = manifest["states"][&ids[1]].clone();
        let layer = manifest["container"]["snapshots"][2]["layer"].clone();
        manifest["container"]["snapshots"][0]["layer"] = layer;
    });
    b.receive(&[], &poison).ok();
    b.receive(&[], &stream).fails(
        1,
        &[
            "web@snap0",
            "another content",
            "cowl rm web@snap0",
            "--again",
        ],
    );
    b.cli.ok(["rm", "web@snap0", "--yes"]);
    b.receive(&["--again"], &stream).ok();
    assert_eq!(
        b.json(&["list", "web", "--json"])["snapshots"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
}
