//! Draws the tree of snapshots as lines of text.
//!
//! Pure.
//!
//! A chain of descendants stays in one column, whatever its length. Only where a snapshot has several children,
//! the side branches are indented.

use std::collections::HashMap;

use crate::store::manifest::SnapshotId;

/// A line of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeLine {
    /// The branch characters before the name.
    pub prefix: String,
    /// The snapshot; `None` for the current state.
    pub id: Option<SnapshotId>,
}

/// Returns the lines of the tree of snapshots.
///
/// The snapshots come with their parents and in the order of creation; `now` is the parent of the current
/// state. A parent that is not in the list, because it was removed, counts as none.
pub fn draw_tree(
    snapshots: &[(SnapshotId, Option<SnapshotId>)],
    now: Option<SnapshotId>,
) -> Vec<TreeLine> {
    let parents: HashMap<_, _> = snapshots.iter().copied().collect();
    let in_list = |id: Option<SnapshotId>| id.filter(|id| parents.contains_key(id));
    let mut children: HashMap<Option<SnapshotId>, Vec<Option<SnapshotId>>> = HashMap::new();
    for (id, parent) in snapshots {
        // A snapshot that is its own parent would be its own descendant forever.
        let parent = in_list(*parent).filter(|parent| parent != id);
        children.entry(parent).or_default().push(Some(*id));
    }
    children.entry(in_list(now)).or_default().push(None);
    // The main branch consists of the ancestors of the current state.
    let mut main = std::collections::HashSet::new();
    let mut at = in_list(now);
    while let Some(id) = at.filter(|id| main.insert(*id)) {
        at = in_list(parents.get(&id).copied().flatten());
    }
    let mut lines = Vec::new();
    // This uses an explicit stack, because recursion over thousands of descendants would overflow the call
    // stack.
    let mut todo = vec![DrawStep::Children(None, String::new())];
    while let Some(step) = todo.pop() {
        match step {
            DrawStep::Children(parent, column) => {
                let mut siblings = children.remove(&parent).unwrap_or_default();
                // The last child continues the column: the current state or its ancestor if there is one.
                let main_child = siblings
                    .iter()
                    .position(|id| id.is_none_or(|id| main.contains(&id)));
                let last = main_child
                    .map(|at| siblings.remove(at))
                    .or_else(|| siblings.pop());
                if let Some(last) = last {
                    todo.push(DrawStep::Line(last, column.clone(), column.clone()));
                }
                for id in siblings.into_iter().rev() {
                    let (first, inner) = (format!("{column}├─ "), format!("{column}│  "));
                    todo.push(DrawStep::Line(id, first, inner));
                }
            }
            DrawStep::Line(id, prefix, column) => {
                lines.push(TreeLine { prefix, id });
                if id.is_some() {
                    todo.push(DrawStep::Children(id, column));
                }
            }
        }
    }
    lines
}

enum DrawStep {
    /// Draw the children of a snapshot in this column.
    Children(Option<SnapshotId>, String),
    /// Draw one line; the second string is the column of its children.
    Line(Option<SnapshotId>, String, String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(parents: &[Option<usize>], now: Option<usize>) -> Vec<String> {
        let ids: Vec<_> = parents.iter().map(|_| SnapshotId::fresh()).collect();
        let list: Vec<_> = ids
            .iter()
            .zip(parents)
            .map(|(id, parent)| (*id, parent.map(|at| ids[at])))
            .collect();
        let name = |line: &TreeLine| match line.id {
            Some(id) => ids
                .iter()
                .position(|other| *other == id)
                .unwrap()
                .to_string(),
            None => "now".to_owned(),
        };
        let lines = draw_tree(&list, now.map(|at| ids[at]));
        assert_eq!(lines.len(), parents.len() + 1, "each once");
        lines
            .iter()
            .map(|line| format!("{}{}", line.prefix, name(line)))
            .collect()
    }

    #[test]
    fn branches_are_drawn_as_columns() {
        assert_eq!(draw(&[], None), ["now"]);
        assert_eq!(
            draw(&[None, Some(0), Some(1)], Some(2)),
            ["0", "1", "2", "now"]
        );
        // 2 and 3 were made after a restore of 0.
        assert_eq!(
            draw(&[None, Some(0), Some(0), Some(2)], Some(3)),
            ["0", "├─ 1", "2", "3", "now"]
        );
        assert_eq!(
            draw(
                &[None, Some(0), Some(1), Some(0), Some(3), Some(3)],
                Some(0)
            ),
            ["0", "├─ 1", "│  2", "├─ 3", "│  ├─ 4", "│  5", "now"]
        );
        // There are two roots, because the parent of one was removed.
        assert_eq!(draw(&[None, None], Some(1)), ["├─ 0", "1", "now"]);
        // The parent of the current state was removed.
        assert_eq!(draw(&[None, Some(0)], None), ["├─ 0", "│  1", "now"]);
    }

    #[test]
    fn a_long_chain_stays_in_one_column_and_a_cycle_terminates() {
        let parents: Vec<_> = (0..20_000usize).map(|at| at.checked_sub(1)).collect();
        let lines = draw(&parents, Some(19_999));
        assert!(lines.iter().all(|line| line.len() <= 5));
        let one = SnapshotId::fresh();
        assert_eq!(draw_tree(&[(one, Some(one))], Some(one)).len(), 2);
    }
}
