//! Containers of a plain user that are mounted with kernel overlayfs.

use cowl_tests::conditions::{Need, can};

use cowl_tests::plain_user::{Ids, NEEDS, as_user};

/// The kernel would discard them when it copies the files up.
#[test]
fn layers_with_recorded_attributes_are_not_mounted_by_the_kernel() {
    if !can(NEEDS) || !can(&[Need::KernelOverlay]) {
        return;
    }
    let output = as_user(
        Ids::Own,
        "",
        "tar -C source --owner 1000 --group 1000 -cf tar.tar .; cowl create web --from tar.tar 2> /dev/null
         cowl mount --driver kernel web 2> error && exit 1; grep -o 'has recorded attributes' error
         cowl mount web > /dev/null; cowl umount web; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(
        output.out(),
        "has recorded attributes",
        "{}",
        output.report()
    );
}

#[test]
fn a_plain_user_mounts_with_the_kernel_driver() {
    if !can(NEEDS) || !can(&[Need::KernelOverlay]) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "ln source/file source/linked; mkdir source/dir
         cowl create web --from source; M=$(cowl mount --driver kernel web 2> error)
         grep -o 'without an index' error
         cowl unshare grep \" $M \" /proc/mounts | grep -o 'overlay.*userxattr' | cut -d' ' -f1
         cowl unshare sh -c \"echo two > $M/file; cat $M/linked; chown 7:8 $M/linked; rm -r $M/etc\"
         cowl snapshot web 2> error || grep -o 'with the driver kernel' error
         cowl unshare --stop 2> error || grep -o 'containers are mounted' error
         cowl umount web; cowl snapshot web; cowl exec web -- /bin/sh -c 'cat /linked; stat -c %h:%u:%g /file'
         cowl exec --driver kernel web -- /bin/sh -c 'cat /linked; cat /file; ls /etc' 2> /dev/null || :
         # The kernel follows no renamed directories in a user namespace.
         cowl exec web -- /bin/busybox mv /dir /moved
         cowl mount --driver kernel web 2> error || grep -o 'moved is a renamed directory' error
         cowl flatten web --base 2> /dev/null; cowl snapshot web > /dev/null; cowl flatten web --base 2> /dev/null
         cowl mount --driver kernel web > /dev/null 2>&1; cowl status web | grep -c ' kernel '; cowl umount web
         cowl check > /dev/null; cowl destroy web --yes 2> /dev/null; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(
        output.out(),
        "without an index\noverlay\none\nwith the driver kernel\ncontainers are mounted\nsnap0\none\n1:0:0\none\ntwo\nmoved is a renamed directory\n1",
        "{}",
        output.report()
    );
}
