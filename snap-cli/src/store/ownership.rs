//! Refuses operations on containers that belong to containerd (docs/decisions/0049).

use super::containerd::ContainerdKind;
use super::manifest::ContainerManifest;
use crate::error::{Error, Result};
use crate::shell::quoted;
use cowl_layers::shown::Show as _;

/// Fails if the container is a snapshot of containerd that no command may open.
pub fn refuse_closed(manifest: &ContainerManifest) -> Result<()> {
    let Some(record) = manifest.containerd.as_deref() else {
        return Ok(());
    };
    if record.is_open() {
        return Ok(());
    }
    let what = match record.kind {
        ContainerdKind::Active => "a layer that containerd is unpacking",
        ContainerdKind::View | ContainerdKind::Committed => "a read-only snapshot of containerd",
    };
    Err(Error::failed(format!(
        "cannot use {}: it is {what} ({})",
        manifest.name,
        record.key.shown()
    ))
    .hint("list the containers of containerd: cowl list --containerd"))
}

/// Fails if the container belongs to containerd. `verb` is the refused operation.
pub fn refuse_owned(manifest: &ContainerManifest, verb: &str) -> Result<()> {
    let Some(record) = manifest.containerd.as_deref() else {
        return Ok(());
    };
    let hint = match record.address() {
        Some((namespace, id)) => format!(
            "use a client of containerd, for example: ctr --namespace {} containers rm {}; if containerd is uninstalled: \
             cowl destroy --containerd {}",
            quoted(namespace),
            quoted(id),
            manifest.name
        ),
        None => "use a client of containerd".to_owned(),
    };
    Err(Error::failed(format!(
        "cannot {verb} {}: it belongs to containerd ({})",
        manifest.name,
        record.key.shown()
    ))
    .hint(hint))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Map;

    use super::super::containerd::ContainerdRecord;
    use super::super::manifest::LayerId;
    use super::super::name::ContainerName;
    use super::*;

    #[test]
    fn only_active_snapshots_with_a_parent_are_open_to_commands() {
        let head = LayerId::fresh();
        let name = ContainerName::parse("ctr.default.web").unwrap();
        let mut manifest = ContainerManifest::new(name, head, &[LayerId::fresh()]);
        refuse_closed(&manifest).unwrap();
        refuse_owned(&manifest, "destroy").unwrap();
        for (kind, name, parent, frozen, is_open) in [
            (ContainerdKind::Active, "web", true, false, true),
            (ContainerdKind::Active, "web", false, false, false),
            (
                ContainerdKind::Active,
                "extract-1-x sha256:0",
                true,
                false,
                false,
            ),
            (ContainerdKind::View, "web", true, false, false),
            (ContainerdKind::Committed, "web", true, true, false),
        ] {
            manifest.containerd = Some(Box::new(ContainerdRecord {
                key: format!("default/1/{name}"),
                kind,
                parent: parent.then(|| "base".to_owned()),
                labels: BTreeMap::new(),
                created: String::new(),
                updated: String::new(),
                committed_from: None,
                labels_before: None,
                snapshots_before: 0,
                undone: 0,
                frozen,
                extra: Map::new(),
            }));
            assert_eq!(refuse_closed(&manifest).is_ok(), is_open);
            let error = refuse_owned(&manifest, "destroy").unwrap_err();
            assert!(error.hint.unwrap().contains("containers rm "));
            assert_eq!(manifest.written_head().is_none(), frozen);
            assert_eq!(manifest.frozen_stack().len(), if frozen { 2 } else { 1 });
        }
    }
}
