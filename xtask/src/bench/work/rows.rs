//! Defines the rows: bash scripts that run as root of the container, first the preparation, then the measured work.

use crate::run::{Result, failure};

/// Size of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    /// Sizes that take seconds, for a smoke test.
    Small,
    /// Sizes that are measured.
    Full,
}

impl Size {
    /// Returns the variables that the scripts use.
    pub(super) fn variables(self) -> &'static str {
        match self {
            Self::Small => {
                "PACKAGE=file REPOSITORY=repository-500 CONFIGURATION=allnoconfig SCALE=1 \
                 TRANSACTIONS=50 TREE=/usr/share/perl5 REMOVED=/usr/share/doc"
            }
            Self::Full => {
                "PACKAGE=golang-go REPOSITORY=repository-20000 CONFIGURATION=defconfig SCALE=10 \
                 TRANSACTIONS=2000 TREE=/usr REMOVED=/usr/share"
            }
        }
    }
}

/// State of the caches at the start of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caches {
    /// As the preparation has left them.
    Warm,
    /// Empty.
    Dropped,
}

/// A row of the comparison.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkRow {
    pub(super) name: &'static str,
    /// Path in the image that the row needs.
    pub(super) needs: &'static str,
    pub(super) prepare: &'static str,
    pub(super) caches: Caches,
    pub(super) work: &'static str,
}

/// Functions of the scripts.
pub(super) const FUNCTIONS: &str = r#"
postgres() { setpriv --reuid postgres --regid postgres --init-groups "$(ls -d /usr/lib/postgresql/*/bin)/$1" "${@:2}"; }
start_database() {
    install -d -o postgres -g postgres /run/postgresql
    postgres pg_ctl -s -w -D /srv/database -l /srv/database/log start
}
"#;

const CLONE: &str = "git clone -q file:///root/$REPOSITORY /root/clone";
const FILL: &str = "postgres pgbench -i -q -s $SCALE -U postgres postgres";
const START_AND_FILL: &str =
    "start_database; postgres pgbench -i -q -s $SCALE -U postgres postgres";
const ARCHIVE: &str = "tar -c $TREE | cat > /dev/null";

/// Returns all rows, in the order of the report.
pub(super) fn all() -> Vec<WorkRow> {
    let row = |name, needs, prepare, work| WorkRow {
        name,
        needs,
        prepare,
        caches: Caches::Warm,
        work,
    };
    vec![
        row(
            "apt-install",
            "var/cache/apt/archives",
            ":",
            "apt-get install -y -qq --no-download --no-install-recommends $PACKAGE",
        ),
        row("git-clone", "root/repository-20000", ":", CLONE),
        row(
            "git-status",
            "root/repository-20000",
            CLONE,
            "for run in 1 2 3 4 5; do git -C /root/clone status --porcelain; done",
        ),
        row(
            "make",
            "root/busybox",
            "make -C /root/busybox -s $CONFIGURATION",
            "make -C /root/busybox -s -j$(nproc)",
        ),
        row(
            "pip-install",
            "root/wheels",
            ":",
            "pip install --quiet --no-index --find-links /root/wheels --break-system-packages \
             --root-user-action=ignore django",
        ),
        row("pgbench-init", "srv/database", "start_database", FILL),
        row(
            "pgbench",
            "srv/database",
            START_AND_FILL,
            "postgres pgbench -n -c 2 -j 2 -t $TRANSACTIONS -U postgres postgres",
        ),
        WorkRow {
            caches: Caches::Dropped,
            ..row("tar-cold", "usr", ":", ARCHIVE)
        },
        row("tar-warm", "usr", ARCHIVE, ARCHIVE),
        row("du", "usr", ":", "du -s $TREE"),
        row(
            "grep-r",
            "usr/share",
            ":",
            "grep -rF 'no such text in any file' $REMOVED || :",
        ),
        row("rm-rf", "usr/share", ":", "rm -rf $REMOVED"),
    ]
}

/// Returns the rows with these names, or all rows if there are no names.
pub(super) fn selected(names: &[String]) -> Result<Vec<WorkRow>> {
    let mut rows = all();
    if let Some(name) = names
        .iter()
        .find(|name| rows.iter().all(|row| row.name != **name))
    {
        let known: Vec<_> = rows.iter().map(|row| row.name).collect();
        return failure(format!(
            "unknown row {name}; the rows are: {}",
            known.join(" ")
        ));
    }
    rows.retain(|row| names.is_empty() || names.iter().any(|name| name == row.name));
    Ok(rows)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn rows_are_selected_by_name() {
        assert_eq!(selected(&[]).unwrap().len(), all().len());
        let names = ["du".to_owned(), "make".to_owned()];
        let rows = selected(&names).unwrap();
        let rows: Vec<_> = rows.iter().map(|row| row.name).collect();
        assert_eq!(rows, ["make", "du"]);
        let error = selected(&["dú".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("git-status"), "{error}");
    }

    #[test]
    fn every_variable_of_a_script_has_a_value_in_both_sizes() {
        for row in all() {
            for script in [row.prepare, row.work] {
                for name in script.split('$').skip(1) {
                    let name: String = name.chars().take_while(char::is_ascii_uppercase).collect();
                    for size in [Size::Small, Size::Full] {
                        let assignment = format!("{name}=");
                        assert!(size.variables().contains(&assignment), "{}", row.name);
                    }
                }
            }
        }
    }
}
