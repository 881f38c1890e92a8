//! `cowl diff`, compared with the differences of two plain trees, and with patch(1).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use cowl_tests::command::{run, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::tree::{self, Tree};
use rustix::fs::FileType;

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

/// A source of numbers that is the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// Returns a path that may or may not exist, at most three directories deep. Unless `mixed`, no name is used for
    /// both a directory and a file.
    fn path(&mut self, root: &Path, mixed: bool) -> PathBuf {
        let mut path = root.to_owned();
        let names = ["a", "b b", "c\u{e9}\t\"", "d", "e"];
        let (dirs, files) = match mixed {
            true => (&names[..], &names[..]),
            false => names.split_at(2),
        };
        for _ in 0..self.below(3) {
            path.push(self.one_of(dirs));
        }
        path.push(self.one_of(files));
        path
    }

    fn one_of(&mut self, names: &[&'static str]) -> &'static str {
        let at = usize::try_from(self.below(names.len() as u64)).unwrap();
        names.get(at).unwrap()
    }
}

/// Makes a random change. A change that is not possible, such as one in a directory that does not exist, is left out.
fn change(random: &mut Random, root: &Path, mixed: bool) {
    let path = random.path(root, mixed);
    let other = random.path(root, mixed);
    let number = random.below(1_000_000);
    let clear = |path: &Path| match path.is_dir() && !path.is_symlink() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    let done = match random.below(12) {
        kind if kind < 4 || !mixed && matches!(kind, 4 | 9) => {
            fs::create_dir_all(path.parent().unwrap())
                .and_then(|()| fs::write(&path, format!("line\n{number}\nline\n")))
        }
        4 => fs::create_dir_all(&path),
        5 => clear(&path),
        6 => fs::rename(&path, &other),
        7 => fs::hard_link(&path, &other),
        8 => {
            let link = path.with_file_name(format!("link{}", number % 3));
            drop(fs::remove_file(&link));
            symlink(number.to_string(), link)
        }
        9 => clear(&path).and_then(|()| fs::create_dir_all(&path)),
        10 if !path.is_symlink() => fs::set_permissions(
            &path,
            PermissionsExt::from_mode(0o700 + u32::try_from(number % 64).unwrap()),
        ),
        _ => std::os::unix::fs::lchown(&path, Some(u32::try_from(number % 3).unwrap()), None),
    };
    drop(done);
}

/// Returns the expected lines of a diff without renames, from the content of two trees.
fn expected(old: &Tree, new: &Tree) -> BTreeSet<String> {
    let paths: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let shown = |path: &[u8]| {
        let mut text = String::new();
        for chunk in path.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c.is_control() || c == '\\' {
                    true => text.extend(c.escape_default()),
                    false => text.push(c),
                }
            }
            text.push_str(&chunk.invalid().escape_ascii().to_string());
        }
        text
    };
    let letter = |path: &&Vec<u8>| {
        let (one, two) = (old.get(*path), new.get(*path));
        let letter = match (one, two) {
            (Some(_), None) => "D",
            (None, _) => "A",
            (Some(one), Some(two)) if one.kind != two.kind => "T",
            (Some(one), Some(two)) => {
                let is_dir = one.kind == FileType::Directory;
                let differs = (one.mode, one.uid, one.gid, &one.xattrs)
                    != (two.mode, two.uid, two.gid, &two.xattrs)
                    || !is_dir
                        && (one.mtime, one.size, one.content, &one.target)
                            != (two.mtime, two.size, two.content, &two.target);
                if !differs {
                    return None;
                }
                "M"
            }
        };
        Some(format!("{letter} /{}", shown(path)))
    };
    paths.iter().filter_map(letter).collect()
}

fn exported(store: &Store, address: &str, name: &str) -> PathBuf {
    let dir = store.scratch().join(name);
    store
        .cowl(["export", "--dir", address, dir.to_str().unwrap()])
        .ok();
    dir
}

#[test]
fn a_diff_equals_that_of_two_plain_trees() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    let mut random = Random(7);
    for _ in 0..150 {
        change(&mut random, &source, false);
    }
    for number in 0..6 {
        let kept = source.join(format!("kept{number}/in"));
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join("one"), "one\n").unwrap();
        fs::write(kept.join("two"), "two\n").unwrap();
    }
    store.create("web", &source);
    let mount_point = store.mount("web");
    let mut trees = Vec::new();
    for round in 0..6 {
        store.cowl(["snapshot", "web"]).ok();
        let snapshot = format!("web@snap{round}");
        let plain = exported(&store, &snapshot, &format!("plain{round}"));
        trees.push((snapshot, plain.clone(), tree::read(&plain).unwrap()));
        for _ in 0..60 {
            change(&mut random, &mount_point, round >= 3);
        }
        let kept = mount_point.join(format!("moved{round}"));
        fs::rename(mount_point.join(format!("kept{round}")), &kept).unwrap();
        fs::write(kept.join("in/one"), format!("changed {round}\n")).unwrap();
    }
    let mut renames = 0;
    for (from, _, old) in &trees {
        for (to, _, new) in &trees {
            let output = store.cowl(["diff", from, to, "--no-renames"]).ok().out();
            let output: BTreeSet<_> = output.lines().map(str::to_owned).collect();
            assert_eq!(output, expected(old, new), "{from} {to}");
            let with = store.cowl(["diff", from, to]).ok().out();
            renames += with.lines().filter(|line| line.starts_with('R')).count();
        }
    }
    assert!(renames > 10, "only {renames} renames were reported");
    // patch(1) does not create a directory in place of a file or a symlink.
    patched(&store, &trees[..4]);
    store.cowl(["umount", "web"]).ok();
}

/// patch(1) and git make of one plain tree the other, as far as a patch can say it.
fn patched(store: &Store, trees: &[(String, PathBuf, Tree)]) {
    let programs = [Need::Program("patch"), Need::Program("git")];
    if !can(&programs) {
        return;
    }
    for pair in trees.windows(2) {
        let [(from, old, _), (to, _, new)] = pair else {
            continue;
        };
        let patch = store.cowl(["diff", from, to, "--patch"]).ok();
        let file = store.scratch().join("patch");
        fs::write(&file, &patch.stdout).unwrap();
        for line in [
            "patch -p1 --quiet --no-backup-if-mismatch < ../patch",
            "git -c core.fileMode=true apply --unsafe-paths --whitespace=nowarn ../patch",
        ] {
            let copy = store.scratch().join("copy");
            run("cp", ["-a".as_ref(), old.as_os_str(), copy.as_os_str()]).ok();
            cowl_tests::command::sh_in(&copy, line).ok();
            let texts = |tree: &Tree| -> Vec<_> {
                let texts = tree
                    .iter()
                    .filter(|(_, entry)| entry.kind != FileType::Directory);
                texts
                    .map(|(path, entry)| {
                        let path = path.escape_ascii().to_string();
                        (path, entry.kind, entry.content, entry.target.clone())
                    })
                    .collect()
            };
            let made = tree::read(&copy).unwrap();
            assert_eq!(texts(&made), texts(new), "{from} {to}: {line}");
            fs::remove_dir_all(&copy).unwrap();
        }
    }
}

#[test]
fn a_patch_contains_text_and_names_binary_files() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    fs::write(source.join("text"), "a\nb\nc").unwrap();
    fs::write(source.join("binary"), b"a\0b").unwrap();
    fs::write(source.join("owned"), "x\n").unwrap();
    symlink("old", source.join("link")).unwrap();
    store.create("web", &source);
    store.cowl(["snapshot", "web"]).ok();
    cowl_tests::command::sh_in(
        &store.mount("web"),
        "printf 'a\\nB\\nc' > text; printf 'a\\0c' > binary; chown 5:6 owned; chmod 4755 owned
         ln -sfn new link; mkdir added; chmod 700 added; mkfifo pipe; mknod null c 1 3
         : > empty; printf x > 'with space'",
    )
    .ok();
    let output = store.cowl(["diff", "web", "--patch"]).ok().out();
    for words in [
        "--- a/text\n+++ b/text\n@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n\\ No newline",
        "Binary files a/binary and b/binary differ",
        "# /owned: owner 0:0 -> 5:6\n# /owned: mode 0644 -> 4755\n",
        "old mode 100644\nnew mode 100755\n",
        "deleted file mode 120000\n--- a/link\n+++ /dev/null\n@@ -1,1 +0,0 @@\n-old\n",
        "new file mode 120000\n--- /dev/null\n+++ b/link\n@@ -0,0 +1,1 @@\n+new\n",
        "# /added: directory added, mode 0700, owner 0:0\n",
        "# /pipe: named pipe added, mode 0644, owner 0:0\n",
        "# /null: character device 1:3 added, mode 0644, owner 0:0\n",
        "diff --git a/empty b/empty\nnew file mode 100644\n",
        "+++ \"b/with space\"\n",
    ] {
        assert!(output.contains(words), "no {words:?} in\n{output}");
    }
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn only_the_given_paths_are_read() {
    let needs = [Need::Root, Need::Program("strace")];
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    for dir in 0..200 {
        let dir = source.join(format!("big/{dir}"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), "x").unwrap();
    }
    fs::create_dir_all(source.join("etc/apt")).unwrap();
    fs::write(source.join("etc/fstab"), "old\n").unwrap();
    store.create("web", &source);
    store.cowl(["snapshot", "web"]).ok();
    // The second container has new layers, so a diff without paths reads every directory.
    fs::write(source.join("etc/fstab"), "new\n").unwrap();
    store.create("other", &source);
    let traced = |paths: &[&str]| {
        let log = store.scratch().join("trace");
        let plain = store.command([&["diff", "web@snap0", "other"], paths].concat());
        let mut command = std::process::Command::new("strace");
        command
            .args(["-f", "-s", "300", "-e", "trace=file,getdents64", "-o"])
            .arg(&log);
        command.arg(plain.get_program()).args(plain.get_args());
        let output = run_command(command, b"").ok().out();
        (output, fs::read_to_string(log).unwrap())
    };
    let calls = |trace: &str| trace.lines().count();
    let (output, whole) = traced(&[]);
    assert!(
        output.lines().any(|line| line == "M /etc/fstab"),
        "{output}"
    );
    assert!(whole.contains("\"big\""));
    let (output, part) = traced(&["--", "etc/fstab", "etc/apt"]);
    assert_eq!(output, "M /etc/fstab");
    assert!(!part.contains("\"big\""), "big was read");
    assert!(
        calls(&whole) > calls(&part) + 800,
        "{} {}",
        calls(&whole),
        calls(&part)
    );
}
