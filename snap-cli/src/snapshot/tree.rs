//! Which snapshot was made from which, as lines to print. Pure.
//!
//! A line of descent stays in its column, however long it is; only where several were made from one
//! snapshot do the side lines step in.

use std::collections::HashMap;

use crate::store::manifest::SnapshotId;

/// A line of the tree: what stands before the name, and what the line is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Bars and corners.
    pub prefix: String,
    /// The snapshot; `None` is what the container is now.
    pub id: Option<SnapshotId>,
}

/// The tree of snapshots, each with its parent, in the order in which they were taken; `now` is the parent
/// of what the container is now. A parent that is not in the list (it was removed) counts as none.
pub fn tree(snapshots: &[(SnapshotId, Option<SnapshotId>)], now: Option<SnapshotId>) -> Vec<Line> {
    let known: HashMap<_, _> = snapshots.iter().copied().collect();
    let in_list = |id: Option<SnapshotId>| id.filter(|id| known.contains_key(id));
    let mut children: HashMap<Option<SnapshotId>, Vec<Option<SnapshotId>>> = HashMap::new();
    for (id, parent) in snapshots {
        // One that names itself would be its own child for ever.
        let parent = in_list(*parent).filter(|parent| parent != id);
        children.entry(parent).or_default().push(Some(*id));
    }
    children.entry(in_list(now)).or_default().push(None);
    // The main line is the one that leads to now, with all its ancestors.
    let mut main = std::collections::HashSet::new();
    let mut at = in_list(now);
    while let Some(id) = at.filter(|id| main.insert(*id)) {
        at = in_list(known.get(&id).copied().flatten());
    }
    let mut lines = Vec::new();
    // Not recursive: a line of descent may have thousands of members.
    let mut todo = vec![Step::Children(None, String::new())];
    while let Some(step) = todo.pop() {
        match step {
            Step::Children(parent, column) => {
                let mut born = children.remove(&parent).unwrap_or_default();
                // The last one goes on in the column; now, or what leads there, before any other.
                let on = born
                    .iter()
                    .position(|id| id.is_none_or(|id| main.contains(&id)));
                let last = on.map(|at| born.remove(at)).or_else(|| born.pop());
                if let Some(last) = last {
                    todo.push(Step::Line(last, column.clone(), column.clone()));
                }
                for id in born.into_iter().rev() {
                    let (first, inner) = (format!("{column}├─ "), format!("{column}│  "));
                    todo.push(Step::Line(id, first, inner));
                }
            }
            Step::Line(id, prefix, column) => {
                lines.push(Line { prefix, id });
                if id.is_some() {
                    todo.push(Step::Children(id, column));
                }
            }
        }
    }
    lines
}

enum Step {
    /// What was made from this one, in this column.
    Children(Option<SnapshotId>, String),
    /// One line, and the column of what was made from it.
    Line(Option<SnapshotId>, String, String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(parents: &[Option<usize>], now: Option<usize>) -> Vec<String> {
        let ids: Vec<_> = parents.iter().map(|_| SnapshotId::fresh()).collect();
        let list: Vec<_> = ids
            .iter()
            .zip(parents)
            .map(|(id, parent)| (*id, parent.map(|at| ids[at])))
            .collect();
        let name = |line: &Line| match line.id {
            Some(id) => ids
                .iter()
                .position(|known| *known == id)
                .unwrap()
                .to_string(),
            None => "now".to_owned(),
        };
        let lines = tree(&list, now.map(|at| ids[at]));
        assert_eq!(lines.len(), parents.len() + 1, "each once");
        lines
            .iter()
            .map(|line| format!("{}{}", line.prefix, name(line)))
            .collect()
    }

    #[test]
    fn trees() {
        assert_eq!(drawn(&[], None), ["now"]);
        assert_eq!(
            drawn(&[None, Some(0), Some(1)], Some(2)),
            ["0", "1", "2", "now"]
        );
        // 2 and 3 were made after a restore of 0.
        assert_eq!(
            drawn(&[None, Some(0), Some(0), Some(2)], Some(3)),
            ["0", "├─ 1", "2", "3", "now"]
        );
        assert_eq!(
            drawn(
                &[None, Some(0), Some(1), Some(0), Some(3), Some(3)],
                Some(0)
            ),
            ["0", "├─ 1", "│  2", "├─ 3", "│  ├─ 4", "│  5", "now"]
        );
        // Two beginnings: the parent of one was removed.
        assert_eq!(drawn(&[None, None], Some(1)), ["├─ 0", "1", "now"]);
        // What is now was made from nothing that is there any more.
        assert_eq!(drawn(&[None, Some(0)], None), ["├─ 0", "│  1", "now"]);
    }

    #[test]
    fn a_long_line_stays_narrow_and_a_ring_ends() {
        let parents: Vec<_> = (0..20_000usize).map(|at| at.checked_sub(1)).collect();
        let lines = drawn(&parents, Some(19_999));
        assert!(lines.iter().all(|line| line.len() <= 5));
        let one = SnapshotId::fresh();
        assert_eq!(tree(&[(one, Some(one))], Some(one)).len(), 2);
    }
}
