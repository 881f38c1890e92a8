//! The root filesystem in which the work runs: Debian with the programs, and everything that they would download.

use std::path::PathBuf;

use cowl_tests::rootfs;

use crate::run::{Failure, Result};

/// Name and version of the image in the cache. The version must change with the rest of this file.
const NAME: &str = "work-1";

/// Installed packages.
const PACKAGES: &str =
    "bzip2,ca-certificates,gcc,git,libc6-dev,make,postgresql,postgresql-contrib,python3-pip";

/// Downloads packages into apt's cache, where the work finds them, and makes apt parse its lists, which takes seconds
/// without any use of the file system.
const DOWNLOAD_PACKAGES: &str = r#"
host_apt() { APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -o APT::Sandbox::User=root "$@"; }
host_apt clean
for packages in golang-go file; do
    host_apt -y --no-install-recommends --download-only install $packages
done
chroot "$1" apt-get -qq check
"#;

/// Unpacks the source of a C program.
const DOWNLOAD_SOURCE: &str = r#"
cd "$1/root"
APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -o APT::Sandbox::User=root --download-only source busybox
tar xf busybox_*.orig.tar.*
rm busybox_*
mv busybox-* busybox
"#;

/// Downloads a Python package, with the certificates of this machine. Without access to PyPI, its row is skipped.
const DOWNLOAD_WHEELS: &str = r#"
cp "${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}" "$1/root/ca.crt"
chroot "$1" env -u SSL_CERT_DIR -u PIP_FIND_LINKS PIP_CERT=/root/ca.crt REQUESTS_CA_BUNDLE=/root/ca.crt CURL_CA_BUNDLE=/root/ca.crt \
    SSL_CERT_FILE=/root/ca.crt python3 -m pip download --quiet --dest /root/wheels --only-binary :all: django ||
    rm -rf "$1/root/wheels"
"#;

/// Creates repositories of 20,000 and of 500 files, each with one pack.
const REPOSITORIES: &str = r#"
chroot "$1" bash -euc '
cd /root
for files in 20000 500; do
    git -c init.defaultBranch=main init -q work-$files
    for directory in $(seq $((files / 100))); do
        mkdir work-$files/directory-$directory
        for file in $(seq 100); do
            echo "file $file of directory $directory: $(((directory * 7919 + file) * 104729))" \
                > work-$files/directory-$directory/file-$file
        done
    done
    git -C work-$files add .
    # A collection in the background would still run when the directory is removed.
    git -C work-$files -c gc.auto=0 -c user.name=bench -c user.email=bench@localhost commit -qm all
    git clone -q --bare file:///root/work-$files repository-$files
    rm -rf work-$files
done
'
"#;

/// Creates an empty database.
const DATABASE: &str = r#"
chroot "$1" bash -euc '
install -d -o postgres -g postgres /srv/database
setpriv --reuid postgres --regid postgres --init-groups \
    $(ls -d /usr/lib/postgresql/*/bin)/initdb -D /srv/database -U postgres -A trust > /dev/null
'
"#;

/// Returns the tar archive of the root filesystem, and creates it if it is not cached.
pub(super) fn tar() -> Result<PathBuf> {
    let mut options = vec![
        // The work installs packages from apt's cache.
        "--skip=cleanup/apt".to_owned(),
        format!("--include={PACKAGES}"),
    ];
    for hook in [
        DOWNLOAD_PACKAGES,
        DOWNLOAD_SOURCE,
        DOWNLOAD_WHEELS,
        REPOSITORIES,
        DATABASE,
    ] {
        // mmdebstrap runs it with sh -c, which does not stop at the first error by default.
        options.push(format!("--customize-hook=set -eu; {}", hook.trim()));
    }
    rootfs::custom_tar(NAME, &options)
        .map_err(|error| Failure(format!("cannot create the root filesystem: {error}")))
}
