//! The limits of the kernel on user namespaces, and the commands that change them.

use rustix::io::Errno;

use crate::error::Error;

/// The settings that deny user namespaces to plain users: the path, the value that denies, and the command.
const SETTINGS: [(&str, &str, &str); 3] = [
    (
        "kernel/unprivileged_userns_clone",
        "0",
        "as root: sysctl kernel.unprivileged_userns_clone=1",
    ),
    (
        "user/max_user_namespaces",
        "0",
        "as root: sysctl user.max_user_namespaces=10000",
    ),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "as root: install the AppArmor profile of docs/hosts.md, or type: \
         sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
];

/// Returns the error for a namespace that the kernel did not create, with the command that permits it.
pub(super) fn explain(errno: i32) -> Error {
    let read = |path: &str| std::fs::read_to_string(format!("/proc/sys/{path}"));
    let denies =
        |(path, value, _): &&(&str, &str, &str)| read(path).is_ok_and(|text| text.trim() == *value);
    let errno = Errno::from_raw_os_error(errno);
    let hint = match (SETTINGS.iter().find(denies), errno) {
        (Some((_, _, hint)), _) => *hint,
        (None, Errno::NOSPC) => "as root: sysctl user.max_user_namespaces=10000",
        (None, _) => {
            "allow users to create user namespaces (in a container: also in its seccomp profile)"
        }
    };
    Error::usage("cannot create a user namespace, which plain users need to mount containers")
        .because(std::io::Error::from(errno))
        .hint(hint)
}
