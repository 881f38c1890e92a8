//! Programs that read and write whole trees, and a reader that follows a log.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use cowl_tests::command::{run_command, sh_in};
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::mount::wait_until;
use cowl_tests::rootfs;
use cowl_tests::tree::{self, Compare};

use crate::field::Field;

/// Runs a script that must print nothing on standard error.
#[track_caller]
fn silent(dir: &Path, script: &str) -> String {
    let output = sh_in(dir, script).ok();
    assert_eq!(output.err(), "", "{}", output.report());
    output.out()
}

#[test]
fn tar_and_rsync_copy_a_real_tree() {
    if !can_mount(&[Need::Debian, Need::Program("rsync"), Need::Program("tar")]) {
        return;
    }
    let field = Field::new(|lower| {
        let tree = lower.join("tree");
        std::fs::create_dir(&tree).unwrap();
        rootfs::unpack(&rootfs::debian_tar().unwrap(), &tree).unwrap();
        // A part of it is enough for a short test.
        sh_in(
            &tree,
            "rm -rf root/large root/debs usr/share var/lib/dpkg/info",
        )
        .ok();
    });
    let out = field.beside("out");
    std::fs::create_dir(&out).unwrap();
    let out = out.display().to_string();
    field.compare(|dir, round| {
        let copied = silent(
            dir,
            &format!(
                "tar --sort=name --numeric-owner --xattrs --acls --pax-option=exthdr.name=%d/x/%f,delete=atime,delete=ctime -cf - tree | sha256sum
                 tar -C tree -cf - usr etc | {{ mkdir copy{round}; tar -C copy{round} -xpf -; }}
                 rsync -aHAX --checksum tree/etc tree/var tree/usr copy{round}/
                 rsync -aHAXn --itemize-changes --checksum tree/etc tree/var tree/usr copy{round}/
                 rm -rf {out}/*; rsync -aHAX tree {out}; rsync -aHAXn --itemize-changes --checksum tree {out}
                 rm -rf copy{round}/usr/lib"
            ),
        );
        assert_eq!(copied.lines().count(), 1, "{copied}");
        copied
    });
    let mount = field.mount();
    let (mounted, plain) = (
        tree::read(mount.path()).unwrap(),
        tree::read(&field.plain()).unwrap(),
    );
    let mut both = [mounted, plain];
    for entry in both.iter_mut().flat_map(|tree| tree.values_mut()) {
        // Directories from which something was removed have the time of the removal.
        if entry.kind == rustix::fs::FileType::Directory {
            entry.mtime = (0, 0);
        }
    }
    let [mounted, plain] = both;
    tree::assert_same("copied", &mounted, &plain, Compare::HISTORY);
    mount.unmount();
}

#[test]
fn tail_prints_every_line_of_a_growing_log_once() {
    if !can_mount(&[Need::Program("tail")]) {
        return;
    }
    let field = Field::new(|lower| std::fs::write(lower.join("log"), "0\n").unwrap());
    let attack = field.attack();
    let log = attack.path().join("log");
    let (printed, errors) = (field.beside("printed"), field.beside("errors"));
    let output = |path: &Path| Stdio::from(std::fs::File::create(path).unwrap());
    // By notification, and by looking again and again.
    let mut tails: Vec<_> = [
        &["-n+1", "-f"][..],
        &["-n+1", "-F", "-s0.05", "---disable-inotify"],
    ]
    .iter()
    .enumerate()
    .map(|(number, options)| {
        Command::new("tail")
            .args(*options)
            .arg(&log)
            .stdout(output(&printed.with_extension(number.to_string())))
            .stderr(output(&errors.with_extension(number.to_string())))
            .spawn()
            .unwrap()
    })
    .collect();
    let mut expected = String::from("0\n");
    let mut number = 0;
    while number < 2000 || attack.continues() {
        number += 1;
        let line = format!("{number}\n");
        expected.push_str(&line);
        let mut file = std::fs::File::options().append(true).open(&log).unwrap();
        file.write_all(line.as_bytes()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    for (number, tail) in tails.iter_mut().enumerate() {
        let read = |path: &Path| std::fs::read_to_string(path.with_extension(number.to_string()));
        wait_until("tail to print everything", || {
            read(&printed).unwrap().len() >= expected.len()
        });
        assert!(tail.try_wait().unwrap().is_none(), "tail ended");
        tail.kill().unwrap();
        tail.wait().unwrap();
        assert_eq!(read(&printed).unwrap(), expected);
        assert_eq!(read(&errors).unwrap(), "");
    }
    attack.end();
}

#[test]
fn find_lists_every_name_of_a_large_directory_once() {
    if !can_mount(&[Need::Program("find")]) {
        return;
    }
    const NAMES: u32 = 100_000;
    let field = Field::new(|lower| {
        std::fs::create_dir(lower.join("many")).unwrap();
        let mut names = String::new();
        for number in 0..NAMES {
            write!(names, "many/{number:06}\0").unwrap();
        }
        let mut touch = Command::new("xargs");
        touch.args(["-0", "touch"]).current_dir(lower);
        run_command(touch, names.as_bytes()).ok();
    });
    field.compare(|dir, round| {
        let listed = silent(
            dir,
            &format!(
                "find many -type f | sort > ../list; sha256sum < ../list; uniq -d ../list; wc -l < ../list
                 touch many/more{round}; rm many/{round:06}"
            ),
        );
        let names = NAMES.to_string();
        assert!(listed.ends_with(&names) && listed.lines().count() == 2, "{listed}");
        listed
    });
}
