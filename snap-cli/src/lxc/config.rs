//! The text of an LXC config: parsed without loss, changed in as few lines as possible.
//!
//! Pure: bytes in, bytes out. Cowl's lines are recognized by the container's id.

use cowl_layers::shown::Show as _;

/// The beginning of the comment above the lines that cowl appended.
const COMMENT: &[u8] = b"# cowl keeps this container's files;";

/// The path of the root filesystem.
pub const ROOTFS: &str = "lxc.rootfs.path";
/// A range of the id map.
const IDMAP: &[u8] = b"lxc.idmap";
/// An included file.
pub const INCLUDE: &str = "lxc.include";
/// Whether LXC's tools remove the root filesystem.
const MANAGED: &str = "lxc.rootfs.managed";
/// The hooks, in the order in which cowl adds them.
const PRE_START: &str = "lxc.hook.pre-start";
const PRE_MOUNT: &str = "lxc.hook.pre-mount";
const POST_STOP: &str = "lxc.hook.post-stop";
const DESTROY: &str = "lxc.hook.destroy";

/// Splits a config into lines, line ends included.
fn split_lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|&byte| byte == b'\n')
}

/// Returns the key and the value of a line, without the quotes that LXC strips; `None` for comments and blank lines.
pub fn parse_entry(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let line = line.trim_ascii();
    if line.first() == Some(&b'#') {
        return None;
    }
    let at = line.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (
        line.get(..at)?.trim_ascii(),
        line.get(at + 1..)?.trim_ascii(),
    );
    let unquoted = match value {
        [b'"', inner @ .., b'"'] | [b'\'', inner @ .., b'\''] => inner,
        plain => plain,
    };
    Some((key, unquoted))
}

fn has_key(line: &[u8], key: &str) -> bool {
    parse_entry(line).is_some_and(|(found, _)| found == key.as_bytes())
}

/// Returns the effective value of a key: the last one.
pub fn get<'t>(text: &'t [u8], key: &str) -> Option<&'t [u8]> {
    let values = split_lines(text).filter_map(parse_entry);
    let last = values.filter(|(found, _)| *found == key.as_bytes()).last();
    last.map(|(_, value)| value)
        .filter(|value| !value.is_empty())
}

/// Returns whether a config has a line with this key, also one with an empty value.
pub fn has(text: &[u8], key: &str) -> bool {
    let mut entries = split_lines(text).filter_map(parse_entry);
    entries.any(|(found, _)| found == key.as_bytes())
}

/// The ranges of ids of a container: the first id inside, the first id on the host, the count.
///
/// LXC does not start a container with a range that it cannot parse. Its other ranges are here, but they are not complete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    /// The ranges of users.
    pub users: Vec<[u32; 3]>,
    /// The ranges of groups.
    pub groups: Vec<[u32; 3]>,
    /// Whether a range is missing because it could not be parsed.
    is_incomplete: bool,
}

impl IdMap {
    /// Parses values of `lxc.idmap`: kind, first id inside, first id outside, count.
    pub fn from_values<'v>(values: impl IntoIterator<Item = &'v [u8]>) -> Self {
        let mut map = Self::default();
        for value in values {
            let mut words = std::str::from_utf8(value)
                .unwrap_or_default()
                .split_ascii_whitespace();
            let kind = words.next();
            let mut number = || words.next()?.parse::<u32>().ok();
            let (Some(inside), Some(outside), Some(count @ 1..)) = (number(), number(), number())
            else {
                map.is_incomplete = true;
                continue;
            };
            match kind {
                Some("u") => map.users.push([inside, outside, count]),
                Some("g") => map.groups.push([inside, outside, count]),
                _ => map.is_incomplete = true,
            }
        }
        map
    }

    /// Returns the map as values of `lxc.idmap`.
    pub fn values(&self) -> impl Iterator<Item = String> {
        let users = self.users.iter().map(|range| ('u', range));
        let groups = self.groups.iter().map(|range| ('g', range));
        let all = users.chain(groups);
        all.map(|(kind, [inside, outside, count])| format!("{kind} {inside} {outside} {count}"))
    }

    /// Returns the map in the text of a config without included files.
    pub fn of(text: &[u8]) -> Self {
        let mut values = Vec::new();
        for (_, value) in split_lines(text)
            .filter_map(parse_entry)
            .filter(|(key, _)| *key == IDMAP)
        {
            match value.is_empty() {
                true => values.clear(),
                false => values.push(value),
            }
        }
        Self::from_values(values)
    }

    /// Returns the map with other ranges of ids outside.
    pub fn with_ranges(&self, [users, groups]: [Vec<[u32; 3]>; 2]) -> Self {
        Self {
            users,
            groups,
            is_incomplete: self.is_incomplete,
        }
    }

    /// Returns whether the container has no map: its ids are those of the host.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether every range was parsed, and the container has a root user and a root group.
    pub fn is_usable(&self) -> bool {
        let has_root = |ranges: &[[u32; 3]]| ranges.iter().any(|[inside, ..]| *inside == 0);
        !self.is_incomplete && has_root(&self.users) && has_root(&self.groups)
    }

    /// Returns the host's user and group that are root in the container, if that is not root itself.
    pub fn root(&self) -> Option<(u32, u32)> {
        self.root_ids().filter(|(user, _)| *user != 0)
    }

    /// Returns the ids outside that are root in the container.
    pub fn root_ids(&self) -> Option<(u32, u32)> {
        let root_of = |ranges: &[[u32; 3]]| {
            let found = ranges.iter().rev().find(|[inside, ..]| *inside == 0);
            found.map(|[_, outside, _]| *outside)
        };
        root_of(&self.users).zip(root_of(&self.groups))
    }
}

/// The lines that cowl writes into a container's config.
///
/// Each value except for the note contains the container's id, by which the lines are recognized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnLines {
    /// The container's id.
    pub id: String,
    /// The mount point of the root filesystem.
    pub rootfs: Vec<u8>,
    /// The commands of the hooks.
    pub pre_start: Vec<u8>,
    /// The command of the hook that mounts in the container's namespaces; only for a container of a plain user.
    pub pre_mount: Option<Vec<u8>>,
    /// See `pre_start`.
    pub post_stop: Vec<u8>,
    /// See `pre_start`.
    pub destroy: Vec<u8>,
    /// The note on how to remove the lines, for users.
    pub note: String,
}

/// Returns whether cowl wrote a line for the container `id`.
fn is_ours(line: &[u8], id: &str) -> bool {
    parse_entry(line).is_some_and(|(key, value)| {
        [ROOTFS, PRE_START, PRE_MOUNT, POST_STOP, DESTROY]
            .iter()
            .any(|ours| ours.as_bytes() == key)
            && value.windows(id.len()).any(|part| part == id.as_bytes())
    })
}

/// Returns whether cowl wrote any line for the container `id`.
pub fn has_own_lines(text: &[u8], id: &str) -> bool {
    split_lines(text).any(|line| is_ours(line, id))
}

fn format_line(key: impl AsRef<[u8]>, value: &[u8]) -> Vec<u8> {
    [key.as_ref(), b" = ", value, b"\n"].concat()
}

/// Adds cowl's lines: the root filesystem replaces the previous line, the others follow at the end.
///
/// The hooks that mount precede all other hooks, which may access the root filesystem.
pub fn attach(text: &[u8], ours: &OwnLines) -> Vec<u8> {
    let plain = detach(&detach_all(text, None), None, &ours.id);
    let all: Vec<&[u8]> = split_lines(&plain).collect();
    let at = all.iter().rposition(|line| has_key(line, ROOTFS));
    let mounting = [
        (PRE_START, Some(&ours.pre_start)),
        (PRE_MOUNT, ours.pre_mount.as_ref()),
    ];
    let mounting = mounting.map(|(key, hook)| (key, hook, first_hook(&all, key)));
    let mut out = Vec::with_capacity(plain.len() + 512);
    for (number, line) in all.iter().enumerate() {
        for (key, hook, first) in mounting {
            if let (Some(hook), true) = (hook, first == Some(number)) {
                out.extend(format_line(key, hook));
            }
        }
        if at == Some(number) {
            out.extend(format_line(
                ROOTFS,
                &[b"dir:", ours.rootfs.as_slice()].concat(),
            ));
        } else {
            out.extend_from_slice(line);
        }
    }
    if !out.is_empty() && !out.ends_with(b"\n") {
        out.push(b'\n');
    }
    out.extend([COMMENT, b" ", ours.note.as_bytes(), b"\n"].concat());
    out.extend(format_line(MANAGED, b"0"));
    if at.is_none() {
        out.extend(format_line(
            ROOTFS,
            &[b"dir:", ours.rootfs.as_slice()].concat(),
        ));
    }
    for (key, hook, first) in mounting {
        if let (Some(hook), None) = (hook, first) {
            out.extend(format_line(key, hook));
        }
    }
    out.extend(format_line(POST_STOP, &ours.post_stop));
    out.extend(format_line(DESTROY, &ours.destroy));
    out
}

/// Returns the line of the first hook of a kind that has an effect: an empty value clears those before it.
fn first_hook(all: &[&[u8]], key: &str) -> Option<usize> {
    let cleared = |line: &&[u8]| {
        parse_entry(line).is_some_and(|(found, value)| found == key.as_bytes() && value.is_empty())
    };
    let after = all.iter().rposition(cleared).map_or(0, |at| at + 1);
    let mut rest = all.iter().skip(after);
    let first = rest.position(|line| has_key(line, key));
    first.map(|at| at + after)
}

/// Removes cowl's lines.
///
/// `original` contains the line of the root filesystem that cowl's replaced. Without it, cowl's line remains,
/// for the caller to replace.
pub fn detach(text: &[u8], original: Option<&[u8]>, id: &str) -> Vec<u8> {
    let was = original.and_then(|text| {
        split_lines(text)
            .filter(|line| has_key(line, ROOTFS))
            .last()
    });
    let mut out = Vec::with_capacity(text.len());
    let mut after_comment = false;
    for line in split_lines(text) {
        let added = after_comment && has_key(line, MANAGED);
        after_comment = line.starts_with(COMMENT);
        if after_comment || added {
            continue;
        }
        if !is_ours(line, id) {
            out.extend_from_slice(line);
        } else if has_key(line, ROOTFS) {
            match (original, was) {
                (Some(_), Some(was)) => {
                    out.extend_from_slice(was);
                    if !was.ends_with(b"\n") {
                        out.push(b'\n');
                    }
                }
                (Some(_), None) => {}
                (None, _) => out.extend_from_slice(line),
            }
        }
    }
    out
}

/// Returns the ids of the containers for which cowl wrote lines.
///
/// The config of another container, or of an imported one, has lines with another id.
pub fn own_ids(text: &[u8]) -> Vec<String> {
    let mut ids = Vec::new();
    for (key, value) in split_lines(text).filter_map(parse_entry) {
        let Some(kind) = [PRE_START, PRE_MOUNT, POST_STOP, DESTROY]
            .iter()
            .find(|ours| ours.as_bytes() == key)
            .and_then(|key| key.strip_prefix("lxc.hook."))
        else {
            continue;
        };
        let mut words = value.rsplit(|&byte| byte == b' ');
        let (id, verb, hook) = (words.next(), words.next(), words.next());
        if (verb, hook) == (Some(kind.as_bytes()), Some(b"hook"))
            && let Some(id) = id.and_then(|id| str::from_utf8(id).ok())
            && is_uuid(id)
            && !ids.iter().any(|known| known == id)
        {
            ids.push(id.to_owned());
        }
    }
    ids
}

fn is_uuid(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
    text.len() == 36 && text.bytes().all(is_part)
}

/// Removes the lines that cowl wrote for any container. See [`detach`] for `original`.
pub fn detach_all(text: &[u8], original: Option<&[u8]>) -> Vec<u8> {
    own_ids(text)
        .iter()
        .fold(text.to_vec(), |text, id| detach(&text, original, id))
}

/// The differences between the config of a copy and the original's.
#[derive(Clone, Debug)]
pub struct CopyRewrite<'a> {
    /// The directory of the original.
    pub from: &'a [u8],
    /// The directory of the copy.
    pub to: &'a [u8],
    /// The name.
    pub name: &'a str,
}

/// Returns the config of a copy, and notes on settings that users should check.
///
/// The copy has its own host name, hardware addresses and files. Fixed names for the host's side of network
/// devices are omitted, because they must be unique.
pub fn rewrite_for_copy(
    text: &[u8],
    rewrite: &CopyRewrite<'_>,
    mut address: impl FnMut() -> [u8; 3],
) -> (Vec<u8>, Vec<String>) {
    let mut out = Vec::with_capacity(text.len());
    let mut notes = Vec::new();
    for line in split_lines(text) {
        let Some((key, value)) = parse_entry(line) else {
            out.extend_from_slice(line);
            continue;
        };
        let shown = key.shown().to_string();
        if key == b"lxc.uts.name" {
            out.extend(format_line("lxc.uts.name", rewrite.name.as_bytes()));
        } else if key.ends_with(b".hwaddr") && !value.contains(&b'x') && !value.contains(&b'X') {
            let [a, b, c] = address();
            out.extend(format_line(
                key,
                format!("00:16:3e:{a:02x}:{b:02x}:{c:02x}").as_bytes(),
            ));
        } else if key.ends_with(b".veth.pair") {
            notes.push(format!(
                "{shown} is omitted: a name on the host's side must be unique"
            ));
        } else {
            if key.ends_with(b".address") && !value.is_empty() {
                notes.push(format!(
                    "{shown} is the same in both: change it before running both"
                ));
            }
            out.extend(replace_dir(line, rewrite));
        }
    }
    (out, notes)
}

/// Replaces paths in the old directory by paths in the new one.
pub fn replace_dir(line: &[u8], rewrite: &CopyRewrite<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some(first) = rest.first() {
        let ends = |after: Option<&u8>| after.is_none_or(|byte| b"/ \t\r\n\"':,".contains(byte));
        match rest.strip_prefix(rewrite.from) {
            Some(after) if !rewrite.from.is_empty() && ends(after.first()) => {
                out.extend_from_slice(rewrite.to);
                rest = after;
            }
            _ => {
                out.push(*first);
                rest = rest.get(1..).unwrap_or_default();
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &[u8] =
        b"# head\n\nlxc.include = /usr/share/x.conf\n  lxc.rootfs.path=dir:/l/c1/rootfs\n\
        lxc.uts.name = \"c1\"\n#lxc.net.0.type = none\n\n\n";

    fn ours() -> OwnLines {
        let hook = |kind: &str| format!("/bin/cowl --store /s hook {kind} ID-1").into_bytes();
        OwnLines {
            id: "ID-1".to_owned(),
            rootfs: b"/s/mnt/ID-1".to_vec(),
            pre_start: hook("pre-start"),
            pre_mount: None,
            post_stop: hook("post-stop"),
            destroy: hook("destroy"),
            note: "to get them back: cowl release c1".to_owned(),
        }
    }

    #[test]
    fn entries_are_parsed() {
        assert_eq!(
            parse_entry(b" a.b = c d \n"),
            Some((&b"a.b"[..], &b"c d"[..]))
        );
        assert_eq!(parse_entry(b"a='x y'"), Some((&b"a"[..], &b"x y"[..])));
        assert_eq!(
            parse_entry(b"a = 'x' y 'z"),
            Some((&b"a"[..], &b"'x' y 'z"[..]))
        );
        assert_eq!(parse_entry(b"a="), Some((&b"a"[..], &b""[..])));
        assert_eq!(parse_entry(b"  # a = b"), None);
        assert_eq!(parse_entry(b"\n"), None);
        assert_eq!(get(b"a=1\na=2\n", "a"), Some(&b"2"[..]));
        assert_eq!(get(b"a=1\na=\n", "a"), None);
        assert_eq!(get(PLAIN, ROOTFS), Some(&b"dir:/l/c1/rootfs"[..]));
    }

    #[test]
    fn attach_replaces_one_line_and_appends_the_others() {
        let text = attach(PLAIN, &ours());
        let expected = "# head\n\nlxc.include = /usr/share/x.conf\n\
            lxc.rootfs.path = dir:/s/mnt/ID-1\nlxc.uts.name = \"c1\"\n#lxc.net.0.type = none\n\n\n\
            # cowl keeps this container's files; to get them back: cowl release c1\n\
            lxc.rootfs.managed = 0\n\
            lxc.hook.pre-start = /bin/cowl --store /s hook pre-start ID-1\n\
            lxc.hook.post-stop = /bin/cowl --store /s hook post-stop ID-1\n\
            lxc.hook.destroy = /bin/cowl --store /s hook destroy ID-1\n";
        assert_eq!(String::from_utf8(text.clone()).unwrap(), expected);
        assert!(
            has_own_lines(&text, "ID-1")
                && !has_own_lines(&text, "ID-2")
                && !has_own_lines(PLAIN, "ID-1")
        );
        assert_eq!(attach(&text, &ours()), text);
        assert_eq!(detach(&text, Some(PLAIN), "ID-1"), PLAIN);
    }

    #[test]
    fn detach_preserves_edits_by_users() {
        let text = String::from_utf8(attach(PLAIN, &ours())).unwrap();
        let text = text.replace("\"c1\"", "web") + "lxc.start.auto = 1\n";
        let text = text.replace("# head\n", "# head\nlxc.rootfs.managed = 1\n");
        let back = String::from_utf8(detach(text.as_bytes(), Some(PLAIN), "ID-1")).unwrap();
        let expected = "# head\nlxc.rootfs.managed = 1\n\nlxc.include = /usr/share/x.conf\n  \
            lxc.rootfs.path=dir:/l/c1/rootfs\nlxc.uts.name = web\n#lxc.net.0.type = none\n\n\n\
            lxc.start.auto = 1\n";
        assert_eq!(back, expected);
    }

    #[test]
    fn attach_mounts_before_other_hooks() {
        let text = b"lxc.hook.pre-start = /a\nlxc.hook.pre-start =\nlxc.hook.pre-start = /b";
        let text = String::from_utf8(attach(text, &ours())).unwrap();
        assert!(
            text.starts_with(
                "lxc.hook.pre-start = /a\nlxc.hook.pre-start =\n\
                 lxc.hook.pre-start = /bin/cowl --store /s hook pre-start ID-1\n\
                 lxc.hook.pre-start = /b\n# cowl"
            ),
            "{text}"
        );
        // The original path of the root filesystem is in an included file.
        assert!(text.contains("lxc.rootfs.path = dir:/s/mnt/ID-1\n"));
        let back = detach(text.as_bytes(), Some(b"lxc.hook.pre-start = /a\n"), "ID-1");
        assert_eq!(
            String::from_utf8(back).unwrap(),
            "lxc.hook.pre-start = /a\nlxc.hook.pre-start =\nlxc.hook.pre-start = /b\n"
        );
    }

    #[test]
    fn lines_for_any_container_are_recognized_and_replaced() {
        let id = "1ecb1f24-24dc-49e9-8af7-1bedfb9eb8cc";
        let hook = |kind: &str| format!("/bin/cowl --store '/t' hook {kind} {id}").into_bytes();
        let other = OwnLines {
            id: id.to_owned(),
            rootfs: format!("/t/mnt/{id}").into_bytes(),
            pre_start: hook("pre-start"),
            pre_mount: None,
            post_stop: hook("post-stop"),
            destroy: hook("destroy"),
            ..ours()
        };
        let theirs = attach(PLAIN, &other);
        assert_eq!(own_ids(&theirs), [id]);
        for foreign in [
            format!("lxc.hook.destroy = /bin/x hook pre-start {id}\n"),
            format!("lxc.hook.start = /bin/x hook start {id}\n"),
            "lxc.hook.destroy = /bin/x hook destroy web\n".to_owned(),
        ] {
            assert_eq!(own_ids(foreign.as_bytes()), [""; 0], "{foreign}");
        }
        assert_eq!(detach_all(&theirs, Some(PLAIN)), PLAIN);
        assert_eq!(attach(&theirs, &ours()), attach(PLAIN, &ours()));
    }

    #[test]
    fn a_copy_has_its_own_name_addresses_and_files() {
        let text = b"# /l/c1/x\nlxc.uts.name = c1\nlxc.net.0.hwaddr = 00:16:3e:11:22:33\n\
            lxc.net.1.hwaddr = 00:16:3e:xx:xx:xx\nlxc.net.0.veth.pair = v1\n\
            lxc.net.0.ipv4.address = 10.0.0.2/24\nlxc.mount.fstab = /l/c1/fstab\n\
            lxc.mount.entry = /l/c10 /l/c1/rootfs/x none bind\n";
        let rewrite = CopyRewrite {
            from: b"/l/c1",
            to: b"/l/c2",
            name: "c2",
        };
        let (text, notes) = rewrite_for_copy(text, &rewrite, || [1, 2, 0xab]);
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "# /l/c1/x\nlxc.uts.name = c2\nlxc.net.0.hwaddr = 00:16:3e:01:02:ab\n\
             lxc.net.1.hwaddr = 00:16:3e:xx:xx:xx\nlxc.net.0.ipv4.address = 10.0.0.2/24\n\
             lxc.mount.fstab = /l/c2/fstab\nlxc.mount.entry = /l/c10 /l/c2/rootfs/x none bind\n"
        );
        assert_eq!(notes.len(), 2);
    }

    #[test]
    fn the_mapped_root_needs_both_maps_of_id_0() {
        let map = b"lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 200000 65536\n";
        assert_eq!(IdMap::of(map).root(), Some((100_000, 200_000)));
        for none in [
            &b"lxc.uts.name = c1\n"[..],
            b"lxc.idmap = u 0 100000 65536\n",
            b"lxc.idmap = u 1 100000 65536\nlxc.idmap = g 1 100000 65536\n",
            b"lxc.idmap = u 0 0 65536\nlxc.idmap = g 0 0 65536\n",
            b"lxc.idmap = u 0 100000 0\nlxc.idmap = g 0 100000 0\n",
            b"lxc.idmap = u 0 1 2\nlxc.idmap = g 0 1 2\nlxc.idmap =\n",
            b"lxc.idmap = u 0 x 2\nlxc.idmap = g 0 -1 2\nlxc.idmap = \xff 0 1\n",
        ] {
            assert_eq!(IdMap::of(none).root(), None, "{}", none.escape_ascii());
        }
    }

    #[test]
    fn only_a_config_without_ranges_has_no_map() {
        let whole = &b"lxc.idmap = u 0 1 2\nlxc.idmap = g 0 1 2\n"[..];
        for (text, is_empty, is_usable) in [
            (&b"lxc.uts.name = c1\n"[..], true, false),
            (b"lxc.idmap = u 0 1 2\nlxc.idmap =\n", true, false),
            (whole, false, true),
            (b"lxc.idmap = u 0 1 2\n", false, false),
            (b"lxc.idmap = u 1 1 2\nlxc.idmap = g 0 1 2\n", false, false),
            (b"lxc.idmap = nonsense\n", false, false),
            (&[whole, b"lxc.idmap = x 5 5 5\n"].concat(), false, false),
            (&[whole, b"lxc.idmap = u 5 5\n"].concat(), false, false),
        ] {
            let map = IdMap::of(text);
            let shown = text.escape_ascii();
            assert_eq!(
                (map.is_empty(), map.is_usable()),
                (is_empty, is_usable),
                "{shown}"
            );
        }
    }
}
