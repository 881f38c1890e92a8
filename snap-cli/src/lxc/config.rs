//! The text of an LXC config: read without loss, changed in as few lines as possible. Pure: bytes in,
//! bytes out. It knows nothing of files, and of cowl only that its lines carry a container's id.

/// What ends a config's lines that cowl added at its end begins with.
const COMMENT: &[u8] = b"# cowl keeps this container's files;";

/// Where the root file system is.
pub const ROOTFS: &str = "lxc.rootfs.path";
/// How ids inside are mapped to those of the machine; once for each range.
const IDMAP: &[u8] = b"lxc.idmap";
/// A file whose lines count as well.
pub const INCLUDE: &str = "lxc.include";
/// Whether LXC's own tools remove it.
const MANAGED: &str = "lxc.rootfs.managed";
/// The hooks, in the order in which they are added.
const PRE_START: &str = "lxc.hook.pre-start";
const POST_STOP: &str = "lxc.hook.post-stop";
const DESTROY: &str = "lxc.hook.destroy";

/// A config as lines, each with what ends it.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|&byte| byte == b'\n')
}

/// Key and value of a line, without the quotes that LXC takes off; `None` for comments and blank lines.
pub fn entry(line: &[u8]) -> Option<(&[u8], &[u8])> {
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
    entry(line).is_some_and(|(found, _)| found == key.as_bytes())
}

/// The value that counts: the last one.
pub fn get<'t>(text: &'t [u8], key: &str) -> Option<&'t [u8]> {
    let values = lines(text).filter_map(entry);
    let last = values.filter(|(found, _)| *found == key.as_bytes()).last();
    last.map(|(_, value)| value)
        .filter(|value| !value.is_empty())
}

/// The user and group of this machine that are root in the container, where that is not root itself.
pub fn mapped_root(text: &[u8]) -> Option<(u32, u32)> {
    let mut values = Vec::new();
    for (_, value) in lines(text)
        .filter_map(entry)
        .filter(|(key, _)| *key == IDMAP)
    {
        match value.is_empty() {
            true => values.clear(),
            false => values.push(value),
        }
    }
    mapped_root_of(values)
}

/// Like [`mapped_root`], by the values of the id map: kind, first id inside, first id outside, number.
pub fn mapped_root_of<'v>(values: impl IntoIterator<Item = &'v [u8]>) -> Option<(u32, u32)> {
    let (mut user, mut group) = (None, None);
    for value in values {
        let mut words = std::str::from_utf8(value).ok()?.split_ascii_whitespace();
        let kind = words.next()?;
        let mut number = || words.next()?.parse::<u32>().ok();
        if let (Some(0), Some(outside), Some(1..)) = (number(), number(), number()) {
            match kind {
                "u" => user = Some(outside),
                "g" => group = Some(outside),
                _ => {}
            }
        }
    }
    user.zip(group).filter(|(user, _)| *user != 0)
}

/// What cowl writes into a container's config. Each value but the note holds the container's id, by which
/// the lines are known again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ours {
    /// The container's id.
    pub id: String,
    /// Where the root file system is mounted.
    pub rootfs: Vec<u8>,
    /// The commands of the hooks.
    pub pre_start: Vec<u8>,
    /// See `pre_start`.
    pub post_stop: Vec<u8>,
    /// See `pre_start`.
    pub destroy: Vec<u8>,
    /// What takes the lines out again, for people to read.
    pub note: String,
}

/// Whether a line is one that cowl wrote for the container `id`.
fn is_ours(line: &[u8], id: &str) -> bool {
    entry(line).is_some_and(|(key, value)| {
        [ROOTFS, PRE_START, POST_STOP, DESTROY]
            .iter()
            .any(|ours| ours.as_bytes() == key)
            && value.windows(id.len()).any(|part| part == id.as_bytes())
    })
}

/// Whether any line is cowl's for the container `id`.
pub fn names(text: &[u8], id: &str) -> bool {
    lines(text).any(|line| is_ours(line, id))
}

fn set(key: &str, value: &[u8]) -> Vec<u8> {
    [key.as_bytes(), b" = ", value, b"\n"].concat()
}

/// The config with cowl's lines: the root file system's in its place, the others at the end; but the hook
/// that mounts comes before any other that may look into the root file system.
pub fn attach(text: &[u8], ours: &Ours) -> Vec<u8> {
    let plain = detach(text, None, &ours.id);
    let all: Vec<&[u8]> = lines(&plain).collect();
    let at = all.iter().rposition(|line| has_key(line, ROOTFS));
    let cleared = |line: &&[u8]| {
        entry(line).is_some_and(|(key, value)| key == PRE_START.as_bytes() && value.is_empty())
    };
    let after = all.iter().rposition(cleared).map_or(0, |at| at + 1);
    let first = all
        .iter()
        .skip(after)
        .position(|line| has_key(line, PRE_START));
    let first = first.map(|at| at + after);
    let mut out = Vec::with_capacity(plain.len() + 512);
    for (number, line) in all.iter().enumerate() {
        if first == Some(number) {
            out.extend(set(PRE_START, &ours.pre_start));
        }
        if at == Some(number) {
            out.extend(set(ROOTFS, &[b"dir:", ours.rootfs.as_slice()].concat()));
        } else {
            out.extend_from_slice(line);
        }
    }
    if !out.is_empty() && !out.ends_with(b"\n") {
        out.push(b'\n');
    }
    out.extend([COMMENT, b" ", ours.note.as_bytes(), b"\n"].concat());
    out.extend(set(MANAGED, b"0"));
    if at.is_none() {
        out.extend(set(ROOTFS, &[b"dir:", ours.rootfs.as_slice()].concat()));
    }
    if first.is_none() {
        out.extend(set(PRE_START, &ours.pre_start));
    }
    out.extend(set(POST_STOP, &ours.post_stop));
    out.extend(set(DESTROY, &ours.destroy));
    out
}

/// The config without cowl's lines; everything else stays. `original` has the line of the root file system
/// that cowl's took the place of; without it that line stays for somebody to replace.
pub fn detach(text: &[u8], original: Option<&[u8]>, id: &str) -> Vec<u8> {
    let was = original.and_then(|text| lines(text).filter(|line| has_key(line, ROOTFS)).last());
    let mut out = Vec::with_capacity(text.len());
    let mut after_comment = false;
    for line in lines(text) {
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

/// What is another in the config of a copy.
#[derive(Clone, Debug)]
pub struct Renamed<'a> {
    /// The folder of the container that it is a copy of.
    pub from: &'a [u8],
    /// Its own.
    pub to: &'a [u8],
    /// Its name.
    pub name: &'a str,
}

/// The config of a copy: another host name, other hardware addresses, files in its own folder; and no fixed
/// names for network devices on this machine's side, of which there can be only one each. The second value
/// is what people should look at.
pub fn renamed(
    text: &[u8],
    how: &Renamed<'_>,
    mut address: impl FnMut() -> [u8; 3],
) -> (Vec<u8>, Vec<String>) {
    let mut out = Vec::with_capacity(text.len());
    let mut notes = Vec::new();
    for line in lines(text) {
        let Some((key, value)) = entry(line) else {
            out.extend_from_slice(line);
            continue;
        };
        let shown = key.escape_ascii().to_string();
        if key == b"lxc.uts.name" {
            out.extend(set("lxc.uts.name", how.name.as_bytes()));
        } else if key.ends_with(b".hwaddr") && !value.contains(&b'x') && !value.contains(&b'X') {
            let [a, b, c] = address();
            out.extend(set(
                &shown,
                format!("00:16:3e:{a:02x}:{b:02x}:{c:02x}").as_bytes(),
            ));
        } else if key.ends_with(b".veth.pair") {
            notes.push(format!(
                "{shown} is left out: a name of this machine's side that is taken"
            ));
        } else {
            if key.ends_with(b".address") && !value.is_empty() {
                notes.push(format!(
                    "{shown} is the same in both: change it before both run"
                ));
            }
            out.extend(moved(line, how));
        }
    }
    (out, notes)
}

/// The line with paths in the old folder led to the new one.
fn moved(line: &[u8], how: &Renamed<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some(first) = rest.first() {
        let ends = |after: Option<&u8>| after.is_none_or(|byte| b"/ \t\r\n\"':,".contains(byte));
        match rest.strip_prefix(how.from) {
            Some(after) if !how.from.is_empty() && ends(after.first()) => {
                out.extend_from_slice(how.to);
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

    fn ours() -> Ours {
        let hook = |kind: &str| format!("/bin/cowl --store /s hook {kind} ID-1").into_bytes();
        Ours {
            id: "ID-1".to_owned(),
            rootfs: b"/s/mnt/ID-1".to_vec(),
            pre_start: hook("pre-start"),
            post_stop: hook("post-stop"),
            destroy: hook("destroy"),
            note: "to get them back: cowl release c1".to_owned(),
        }
    }

    #[test]
    fn entries() {
        assert_eq!(entry(b" a.b = c d \n"), Some((&b"a.b"[..], &b"c d"[..])));
        assert_eq!(entry(b"a='x y'"), Some((&b"a"[..], &b"x y"[..])));
        assert_eq!(entry(b"a = 'x' y 'z"), Some((&b"a"[..], &b"'x' y 'z"[..])));
        assert_eq!(entry(b"a="), Some((&b"a"[..], &b""[..])));
        assert_eq!(entry(b"  # a = b"), None);
        assert_eq!(entry(b"\n"), None);
        assert_eq!(get(b"a=1\na=2\n", "a"), Some(&b"2"[..]));
        assert_eq!(get(b"a=1\na=\n", "a"), None);
        assert_eq!(get(PLAIN, ROOTFS), Some(&b"dir:/l/c1/rootfs"[..]));
    }

    #[test]
    fn only_one_line_changes_and_the_rest_is_added_at_the_end() {
        let text = attach(PLAIN, &ours());
        let expected = "# head\n\nlxc.include = /usr/share/x.conf\n\
            lxc.rootfs.path = dir:/s/mnt/ID-1\nlxc.uts.name = \"c1\"\n#lxc.net.0.type = none\n\n\n\
            # cowl keeps this container's files; to get them back: cowl release c1\n\
            lxc.rootfs.managed = 0\n\
            lxc.hook.pre-start = /bin/cowl --store /s hook pre-start ID-1\n\
            lxc.hook.post-stop = /bin/cowl --store /s hook post-stop ID-1\n\
            lxc.hook.destroy = /bin/cowl --store /s hook destroy ID-1\n";
        assert_eq!(String::from_utf8(text.clone()).unwrap(), expected);
        assert!(names(&text, "ID-1") && !names(&text, "ID-2") && !names(PLAIN, "ID-1"));
        assert_eq!(attach(&text, &ours()), text);
        assert_eq!(detach(&text, Some(PLAIN), "ID-1"), PLAIN);
    }

    #[test]
    fn what_somebody_changed_meanwhile_stays() {
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
    fn the_mount_comes_before_other_hooks() {
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
        // No line of its own says where the root file system is: an included file does.
        assert!(text.contains("lxc.rootfs.path = dir:/s/mnt/ID-1\n"));
        let back = detach(text.as_bytes(), Some(b"lxc.hook.pre-start = /a\n"), "ID-1");
        assert_eq!(
            String::from_utf8(back).unwrap(),
            "lxc.hook.pre-start = /a\nlxc.hook.pre-start =\nlxc.hook.pre-start = /b\n"
        );
    }

    #[test]
    fn a_copy_has_its_own_name_addresses_and_files() {
        let text = b"# /l/c1/x\nlxc.uts.name = c1\nlxc.net.0.hwaddr = 00:16:3e:11:22:33\n\
            lxc.net.1.hwaddr = 00:16:3e:xx:xx:xx\nlxc.net.0.veth.pair = v1\n\
            lxc.net.0.ipv4.address = 10.0.0.2/24\nlxc.mount.fstab = /l/c1/fstab\n\
            lxc.mount.entry = /l/c10 /l/c1/rootfs/x none bind\n";
        let how = Renamed {
            from: b"/l/c1",
            to: b"/l/c2",
            name: "c2",
        };
        let (text, notes) = renamed(text, &how, || [1, 2, 0xab]);
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "# /l/c1/x\nlxc.uts.name = c2\nlxc.net.0.hwaddr = 00:16:3e:01:02:ab\n\
             lxc.net.1.hwaddr = 00:16:3e:xx:xx:xx\nlxc.net.0.ipv4.address = 10.0.0.2/24\n\
             lxc.mount.fstab = /l/c2/fstab\nlxc.mount.entry = /l/c10 /l/c2/rootfs/x none bind\n"
        );
        assert_eq!(notes.len(), 2);
    }

    #[test]
    fn the_mapped_root() {
        let map = b"lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 200000 65536\n";
        assert_eq!(mapped_root(map), Some((100_000, 200_000)));
        for none in [
            &b"lxc.uts.name = c1\n"[..],
            b"lxc.idmap = u 0 100000 65536\n",
            b"lxc.idmap = u 1 100000 65536\nlxc.idmap = g 1 100000 65536\n",
            b"lxc.idmap = u 0 0 65536\nlxc.idmap = g 0 0 65536\n",
            b"lxc.idmap = u 0 100000 0\nlxc.idmap = g 0 100000 0\n",
            b"lxc.idmap = u 0 1 2\nlxc.idmap = g 0 1 2\nlxc.idmap =\n",
            b"lxc.idmap = u 0 x 2\nlxc.idmap = g 0 -1 2\nlxc.idmap = \xff 0 1\n",
        ] {
            assert_eq!(mapped_root(none), None, "{}", none.escape_ascii());
        }
    }
}
