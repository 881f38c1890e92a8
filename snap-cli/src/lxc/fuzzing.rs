//! The fuzz target for LXC configs. See [`cowl_layers::fuzzing`].

use super::config::{self, CopyRewrite, OwnLines};

const ID: &str = "0192f7a6-5d9c-7cc3-9df1-3f0c8c2f4b11";

/// Changes a config as adopt, clone and release do.
///
/// Lines are added once, removing them gives the original lines, and a copy has the keys of its original.
pub fn lxc_config(text: &[u8]) {
    let path = |name: &str| format!("/store/{ID}/{name}").into_bytes();
    let ours = OwnLines {
        id: ID.to_owned(),
        rootfs: path("rootfs"),
        pre_start: path("pre"),
        pre_mount: Some(path("mount")),
        post_stop: path("post"),
        destroy: path("destroy"),
        note: "run cowl release".to_owned(),
    };
    let _mapped = config::IdMap::of(text).root();
    let attached = config::attach(text, &ours);
    assert!(config::has_own_lines(&attached, ID));
    let rootfs = [b"dir:".as_slice(), &ours.rootfs].concat();
    assert_eq!(config::get(&attached, config::ROOTFS), Some(&rootfs[..]));
    // The line of the root filesystem remains where it is, so the order may change once.
    assert_eq!(lines(&config::attach(&attached, &ours)), lines(&attached));
    let detached = config::detach(&attached, Some(text), ID);
    assert!(config::has_own_lines(text, ID) || !config::has_own_lines(&detached, ID));
    let rewrite = CopyRewrite {
        from: b"/old",
        to: b"/new",
        name: "copy",
    };
    let (copy, _) = config::rewrite_for_copy(text, &rewrite, || [1, 2, 3]);
    assert_eq!(keys(&copy), keys(text));
}

/// Returns the lines in a fixed order.
fn lines(text: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<_> = text.split(|&byte| byte == b'\n').collect();
    lines.sort_unstable();
    lines
}

/// Returns the keys that a copy retains, in order.
fn keys(text: &[u8]) -> Vec<&[u8]> {
    let lines = text.split(|&byte| byte == b'\n');
    let keys = lines.filter_map(config::parse_entry).map(|(key, _)| key);
    let has_path = |key: &[u8]| {
        key.windows(4)
            .any(|part| part == b"/old" || part == b"/new")
    };
    keys.filter(|key| !key.ends_with(b".veth.pair") && !has_path(key))
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_is_replayed() {
        cowl_layers::fuzzing::replay("lxc_config", super::lxc_config);
    }
}
