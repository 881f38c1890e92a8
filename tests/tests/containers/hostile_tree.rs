//! Objects that a container's root, or the owner of an LXC directory, prepares for commands that root runs: none
//! makes cowl open a device, block, or leave the tree.

use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};

use cowl_tests::command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// A store, and next to it the LXC container c1 with a host name on its disk.
struct World {
    store: Store,
    lxcpath: PathBuf,
}

impl World {
    fn new() -> World {
        let store = Store::for_test();
        let lxcpath = store.scratch().make("lxc");
        let etc = store.scratch().make("lxc/c1/rootfs/etc");
        std::fs::write(etc.join("hostname"), "c1\n").unwrap();
        let config = format!(
            "lxc.rootfs.path = dir:{}/c1/rootfs\nlxc.uts.name = c1\n",
            lxcpath.display()
        );
        std::fs::write(lxcpath.join("c1/config"), config).unwrap();
        World { store, lxcpath }
    }

    fn adopt(&self) -> command::Output {
        let lxcpath = self.lxcpath.to_str().unwrap();
        self.store.cowl(["adopt", "c1", "-P", lxcpath])
    }

    /// Replaces the host name in the container, as its root could, and clones it.
    fn clone_with(&self, name: &str, make: impl FnOnce(&Path)) {
        let mount_point = self.store.mount("c1");
        let etc = mount_point.join("etc");
        if etc.is_symlink() {
            std::fs::remove_file(&etc).unwrap();
        } else {
            command::run("rm", ["-rf", etc.to_str().unwrap()]).ok();
        }
        make(&mount_point);
        self.store.cowl(["umount", "c1"]).ok();
        self.store.cowl(["clone", "c1", name]).ok();
        let config = self.lxcpath.join(name).join("config");
        let text = std::fs::read_to_string(&config).unwrap();
        assert!(text.contains(&format!("lxc.uts.name = {name}")), "{text}");
    }

    /// Calls `look` with the host name file in the mounted clone.
    fn in_clone<T>(&self, name: &str, look: impl FnOnce(&Path) -> T) -> T {
        let mount_point = self.store.mount(name);
        let found = look(&mount_point.join("etc/hostname"));
        self.store.cowl(["umount", name]).ok();
        found
    }
}

/// A loop device.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Loop {
        let args = ["-f", "--show", file.to_str().unwrap()];
        Loop(command::run("losetup", args).ok().out())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Detaching it writes the data to the file.
        drop(command::run("losetup", ["-d", &self.0]));
    }
}

#[test]
fn the_host_name_of_a_clone_is_written_only_to_its_own_regular_file() {
    if !can(NEEDS) {
        return;
    }
    let world = World::new();
    world.adopt().ok();
    let outside = world.store.scratch().join("outside");
    std::fs::write(&outside, "of the machine\n").unwrap();
    let disk = world.store.scratch().join("disk");
    std::fs::write(&disk, vec![b'x'; 1 << 20]).unwrap();
    let device = Loop::new(&disk);
    let numbers = command::run("stat", ["-c", "%Hr %Lr", &device.0])
        .ok()
        .out();
    let etc = |mount_point: &Path| {
        std::fs::create_dir(mount_point.join("etc")).unwrap();
        mount_point.join("etc/hostname")
    };
    let run = |line: String| drop(command::sh(&line).ok());

    world.clone_with("plain", |mount_point| {
        std::fs::write(etc(mount_point), "c1\n").unwrap()
    });
    assert_eq!(
        world.in_clone("plain", |at| std::fs::read_to_string(at).unwrap()),
        "plain\n"
    );

    world.clone_with("fifo", |mount_point| {
        run(format!("mkfifo {}", etc(mount_point).display()))
    });
    assert!(world.in_clone("fifo", |at| {
        at.symlink_metadata().unwrap().file_type().is_fifo()
    }));

    world.clone_with("block", |mount_point| {
        run(format!("mknod {} b {numbers}", etc(mount_point).display()))
    });
    world.clone_with("char", |mount_point| {
        run(format!("mknod {} c 5 0", etc(mount_point).display()))
    });
    world.clone_with("directory", |mount_point| {
        std::fs::create_dir(etc(mount_point)).unwrap()
    });

    // Links that leave the container resolve to nothing; links inside it are followed to regular files only.
    world.clone_with("absolute", |mount_point| {
        symlink(&outside, etc(mount_point)).unwrap()
    });
    world.clone_with("magic", |mount_point| {
        symlink("/proc/self/root/etc/hostname", etc(mount_point)).unwrap()
    });
    world.clone_with("parent", |mount_point| {
        symlink(outside.parent().unwrap(), mount_point.join("etc")).unwrap();
        std::fs::write(outside.parent().unwrap().join("hostname"), "also\n").unwrap();
    });
    world.clone_with("todevice", |mount_point| {
        symlink("../node", etc(mount_point)).unwrap();
        run(format!("mknod {}/node b {numbers}", mount_point.display()));
    });
    world.clone_with("inside", |mount_point| {
        symlink("/named", etc(mount_point)).unwrap();
        std::fs::write(mount_point.join("named"), "c1\n").unwrap();
    });
    let named = |at: &Path| std::fs::read_to_string(at.with_file_name("../named")).unwrap();
    assert_eq!(world.in_clone("inside", named), "inside\n");

    drop(device);
    assert!(
        std::fs::read(&disk)
            .unwrap()
            .iter()
            .all(|&byte| byte == b'x'),
        "the device was written"
    );
    assert_eq!(
        std::fs::read_to_string(&outside).unwrap(),
        "of the machine\n"
    );
    let also = outside.parent().unwrap().join("hostname");
    assert_eq!(std::fs::read_to_string(also).unwrap(), "also\n");
    // No interrupted operation remains.
    assert_eq!(
        std::fs::read_dir(world.store.path().join("moving"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn a_config_that_is_not_a_regular_file_is_refused() {
    if !can(NEEDS) {
        return;
    }
    let world = World::new();
    let config = world.lxcpath.join("c1/config");
    let text = std::fs::read(&config).unwrap();
    let made = |line: &str| {
        std::fs::remove_file(&config).unwrap();
        command::sh(&format!("{line} {}", config.display())).ok();
        world.adopt()
    };
    made("mkfifo").fails(1, &["config", "not a regular file"]);
    made("ln -s /dev/zero").fails(1, &["config", "not a regular file"]);
    made("ln -s /proc/self/mem").fails(1, &["config"]);
    made("truncate -s 5M").fails(1, &["config", "larger than"]);
    // Another user's link is followed to that user's own files only.
    let real = world.store.scratch().join("real");
    std::fs::write(&real, &text).unwrap();
    let link = format!("ln -s {}", real.display());
    std::fs::remove_file(&config).unwrap();
    symlink(&real, &config).unwrap();
    command::run("chown", ["-h", "1234", config.to_str().unwrap()]).ok();
    world
        .adopt()
        .fails(1, &["config", "link of uid 1234", "uid 0"]);
    assert_eq!(std::fs::read(&real).unwrap(), text);
    // A link owned by root was created by an administrator.
    made(&link).ok();
    assert!(config.is_symlink());
    assert!(
        std::fs::read_to_string(&real)
            .unwrap()
            .contains("hook pre-start")
    );
}
