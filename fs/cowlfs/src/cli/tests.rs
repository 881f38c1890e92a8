//! Tests of the command line.

use std::time::Duration;

use super::*;
use crate::config::{Awake, Coherence, Passthrough};
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::private::{AtimeMode, AtimeUpdates};

fn parse(args: &[&str]) -> Result<Config, String> {
    let args = std::iter::once("cowlfs").chain(args.iter().copied());
    let args = Args::try_parse_from(args).map_err(|error| error.to_string())?;
    args.into_invocation().map(|invocation| invocation.config)
}

#[test]
fn the_options_of_podman_and_mount_are_accepted() {
    let config = parse(&["-o", "lowerdir=A:B,upperdir=U,workdir=W,", "M"]).unwrap();
    assert_eq!(config.lowers, [PathBuf::from("A"), PathBuf::from("B")]);
    assert_eq!(config.upper, Some(("U".into(), "W".into())));
    assert_eq!(config.mountpoint, PathBuf::from("M"));
    assert!(!config.mount.read_only);

    let config = parse(&[
        "-o",
        "lowerdir=A,upperdir=U,workdir=W,,volatile,uidmapping=:0:100000:65536,gidmapping=:0:100000:65536",
        "M",
    ])
    .unwrap();
    assert!(config.overlay.volatile);
    assert_eq!(config.overlay.uids.to_mount(1), 100_001);

    let config = parse(&["-o", r"lowerdir=D,control=a\,b", "M"]).unwrap();
    assert_eq!(config.control, Some("a,b".into()));

    let config = parse(&["-o", "lowerdir=D:E", "M"]).unwrap();
    assert!(config.mount.read_only);

    let config = parse(&["overlay", "/mnt", "-o", "lowerdir=A,dev,suid,rw"]).unwrap();
    assert_eq!(config.mountpoint, PathBuf::from("/mnt"));
}

#[test]
fn data_only_layers_are_parsed() {
    let config = parse(&["-o", r"lowerdir=A:B::C\:x::D", "M"]).unwrap();
    assert_eq!(config.lowers, [PathBuf::from("A"), PathBuf::from("B")]);
    assert_eq!(config.data_only, [PathBuf::from("C:x"), PathBuf::from("D")]);
}

/// Podman cannot be made to pass an option of cowlfs, but its image layers contain `.wh.` names.
#[test]
fn markers_of_image_layers_are_read_unless_disabled() {
    let foreign = |options: &str| {
        let options = format!("lowerdir=A{options}");
        parse(&["-o", &options, "M"]).unwrap().foreign
    };
    assert!(foreign("") && foreign(",fuse_overlayfs"));
    assert!(!foreign(",nofuse_overlayfs"));
    assert!(foreign(",nofuse_overlayfs,fuse_overlayfs"));
    assert!(!Config::new(Vec::new(), None, PathBuf::from("M")).foreign);
}

#[test]
fn escaped_characters_in_paths_are_parsed() {
    let config = parse(&["-o", r"lowerdir=a\:b:c\\d,upperdir=x\,y,workdir=z\:", "M"]).unwrap();
    assert_eq!(config.lowers, [PathBuf::from("a:b"), PathBuf::from(r"c\d")]);
    assert_eq!(config.upper, Some(("x,y".into(), "z:".into())));
}

#[test]
fn every_flag_has_an_effect() {
    let config = parse(&[
        "-o",
        "lowerdir=A,ro,nosuid,nodev,noexec,noatime,nodiratime,nosymfollow,sync,static_nlink,noacl,squash_to_root,userxattr,\
         timeout=0.5,threaded=0,awake=off,passthrough=read,coherence=overlay,metacopy=off,fsync=0,\
         fsname=n,subtype=s,xino=auto,x-foo",
        "M",
    ])
    .unwrap();
    let m = &config.mount;
    assert!(m.read_only && m.nosuid && m.nodev && m.noexec);
    assert!(m.nosymfollow && m.sync && m.atime.nodiratime);
    assert_eq!(m.atime.mode, AtimeMode::Never);
    assert_eq!((&*m.source, &*m.subtype), ("n", "s"));
    let b = &config.overlay;
    assert!(b.static_nlink && b.no_acl && b.volatile && !b.metacopy);
    assert_eq!(b.uids.to_mount(7), 0);
    assert_eq!(config.space, Some(XattrSpace::User));
    assert_eq!(config.cache_timeout, Duration::from_millis(500));
    assert_eq!(config.threads, Some(1));
    assert_eq!(config.passthrough, Passthrough::Read);
    assert_eq!(config.coherence, Coherence::Overlay);
    assert_eq!(config.awake, Awake::Off);
}

/// The arguments of mount.fuse(8) for `mount -o remount,ro M`.
#[test]
fn a_remount_needs_no_layers() {
    let args = [
        "cowlfs",
        "cowlfs",
        "M",
        "-o",
        "ro,noatime,remount,user_id=0,group_id=0,default_permissions,allow_other,dev,suid",
    ];
    let invocation = Args::try_parse_from(args).unwrap().into_invocation();
    let invocation = invocation.unwrap();
    let mount = &invocation.config.mount;
    assert!(invocation.remount && mount.read_only);
    assert_eq!(mount.atime.mode, AtimeMode::Never);
    assert!(!mount.nodev && !mount.nosuid);
}

#[test]
fn later_options_override_earlier_ones() {
    let options = "lowerdir=A,strictatime,nodiratime,nosymfollow,sync";
    let strict = parse(&["-o", options, "M"]).unwrap().mount;
    assert_eq!(strict.atime.mode, AtimeMode::Strict);
    let options = format!("{options},relatime,diratime,symfollow,async");
    let mount = parse(&["-o", &options, "M"]).unwrap().mount;
    assert_eq!(mount.atime, AtimeUpdates::default());
    assert!(!mount.sync && !mount.nosymfollow);
}

/// fuse-overlayfs ignores them as well, and programs pass options of the kernel's overlayfs to both.
#[test]
fn options_without_effect_are_reported() {
    let ignored = |options: &str| {
        let args = ["cowlfs", "-o", &format!("lowerdir=A,{options}"), "M"];
        let args = Args::try_parse_from(args).unwrap();
        args.into_invocation().unwrap().ignored
    };
    for word in [
        "dirsync",
        "lazytime",
        "mand",
        "bogus",
        "bogus=1",
        "nfs_export=on",
    ] {
        let messages = ignored(word);
        let name = word.split('=').next().unwrap();
        assert!(messages.len() == 1 && messages[0].contains(name), "{word}");
    }
    let quiet = "async,nomand,nolazytime,loud,silent,noiversion,users,owner,comment=x,x-a,defaults";
    assert_eq!(ignored(quiet), [""; 0]);
}

#[test]
fn an_error_names_the_invalid_option() {
    for (options, word) in [
        ("upperdir=U,workdir=W", "lowerdir"),
        ("lowerdir=A,upperdir=U", "workdir"),
        ("lowerdir=A,workdir=W", "upperdir"),
        ("lowerdir=A,plugins=x", "plugins"),
        ("lowerdir=A::B:C", "data-only"),
        ("lowerdir=::B", "empty path"),
        ("lowerdir=A::", "empty path"),
        ("lowerdir=A:", "empty path"),
        ("lowerdir=A:::B", "empty path"),
        ("lowerdir=", "empty path"),
        ("lowerdir=A,timeout=x", "timeout"),
        ("lowerdir=A,timeout=-1", "timeout"),
        ("lowerdir=A,uidmapping=1:2", "uidmapping"),
        ("lowerdir=A,metacopy=maybe", "metacopy"),
        ("lowerdir=A,xino=maybe", "xino"),
        ("lowerdir=A,passthrough=maybe", "passthrough"),
        ("lowerdir=A,awake=maybe", "awake"),
        ("lowerdir=A,coherence=maybe", "coherence"),
        ("lowerdir=A,redirect_dir=off", "redirect_dir"),
    ] {
        let error = parse(&["-o", options, "M"]).unwrap_err();
        assert!(error.contains(word), "{options}: {error}");
    }
    assert!(parse(&["-o", "lowerdir=A"]).is_err());
    assert!(parse(&["-o", "lowerdir=A", "a", "b", "c"]).is_err());
}

/// `cowl` compares its own configuration with this one.
#[test]
fn a_managed_mount_has_the_policy_of_a_container() {
    let plain = parse(&["-o", "lowerdir=A", "M"]).unwrap();
    assert!(!plain.snapshots && plain.foreign);
    let managed = parse(&["-o", "lowerdir=A,managed", "M"]).unwrap();
    assert!(managed.snapshots && !managed.foreign);
    let mut expected = plain;
    expected.manage();
    assert_eq!(format!("{managed:?}"), format!("{expected:?}"));
}
