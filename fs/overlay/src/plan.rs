//! Decides which changes in the upper layer a removal or a rename needs. Pure functions, without system calls.

use cowl_layers::sys::node::RenameMode;

/// The upper layer's directory entry for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpperEntry {
    /// Nothing.
    Nothing,
    /// A whiteout.
    Whiteout,
    /// An object.
    Object,
}

/// The state of a name in the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameState {
    /// The entry in the upper.
    pub upper: UpperEntry,
    /// Whether the lower layers have an object that would be visible without the entry in the upper.
    pub below: bool,
}

/// The change in the upper that removes a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovePlan {
    /// The object is only in the upper: remove it.
    Remove,
    /// The object is only in a lower layer: create a whiteout.
    Hide,
    /// The object is in both: replace it with a whiteout atomically.
    ReplaceWithWhiteout,
    /// The name does not exist.
    Absent,
}

/// Returns the change that removes a name.
pub fn remove(name: NameState) -> RemovePlan {
    match (name.upper, name.below) {
        (UpperEntry::Object, true) => RemovePlan::ReplaceWithWhiteout,
        (UpperEntry::Object, false) => RemovePlan::Remove,
        (UpperEntry::Nothing, true) => RemovePlan::Hide,
        (UpperEntry::Nothing, false) | (UpperEntry::Whiteout, _) => RemovePlan::Absent,
    }
}

/// The change in the upper that renames an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenamePlan {
    /// The flags of renameat2(2).
    pub mode: RenameMode,
    /// Whether to remove the whiteout that the exchange moves to the old name, because it hides nothing there.
    pub drop_whiteout: bool,
    /// Whether to make the directory opaque before the rename, because it would merge with a lower directory at the
    /// new name.
    pub make_opaque: bool,
}

/// The type of the renamed object, as far as the plan depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MovedObject {
    /// An object that is not a directory.
    NotDirectory,
    /// A directory with a redirect, which determines the lower directories that it merges with.
    MergedDirectory,
    /// A directory only in the upper, which would merge with a lower directory at the new name.
    Directory,
}

/// Returns the change that renames an object in the upper from `from` to `to`, and replaces the object there.
pub fn rename(from: NameState, to: NameState, moved: MovedObject) -> RenamePlan {
    let is_dir = moved != MovedObject::NotDirectory;
    let (mode, drop_whiteout) = match (from.below, to.upper) {
        // The old name needs a whiteout, and the new name has one.
        (true, UpperEntry::Whiteout) => (RenameMode::Exchange, false),
        (true, UpperEntry::Nothing | UpperEntry::Object) => (RenameMode::Whiteout, false),
        // rename(2) fails with ENOTDIR if a directory would replace a whiteout, which is not a directory.
        (false, UpperEntry::Whiteout) if is_dir => (RenameMode::Exchange, true),
        (false, _) => (RenameMode::Replace, false),
    };
    RenamePlan {
        mode,
        drop_whiteout,
        make_opaque: moved == MovedObject::Directory && to.below,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPPERS: [UpperEntry; 3] = [
        UpperEntry::Nothing,
        UpperEntry::Whiteout,
        UpperEntry::Object,
    ];

    #[test]
    fn removal_hides_lower_objects_and_leaves_no_needless_whiteout() {
        for upper in UPPERS {
            for below in [false, true] {
                let plan = remove(NameState { upper, below });
                let whiteout = matches!(plan, RemovePlan::Hide | RemovePlan::ReplaceWithWhiteout);
                if upper == UpperEntry::Whiteout {
                    assert_eq!(plan, RemovePlan::Absent);
                } else {
                    assert_eq!(whiteout, below);
                }
                assert_eq!(
                    matches!(plan, RemovePlan::Remove | RemovePlan::ReplaceWithWhiteout),
                    upper == UpperEntry::Object
                );
            }
        }
    }

    #[test]
    fn rename_leaves_a_whiteout_exactly_if_a_lower_layer_has_the_old_name() {
        for from_below in [false, true] {
            for upper in UPPERS {
                for below in [false, true] {
                    for moved in [MovedObject::NotDirectory, MovedObject::Directory] {
                        let from = NameState {
                            upper: UpperEntry::Object,
                            below: from_below,
                        };
                        let plan = rename(from, NameState { upper, below }, moved);
                        // The entry at the old name after the rename.
                        let left = match plan.mode {
                            RenameMode::Whiteout => UpperEntry::Whiteout,
                            RenameMode::Exchange if plan.drop_whiteout => UpperEntry::Nothing,
                            RenameMode::Exchange => upper,
                            RenameMode::Replace | RenameMode::NoReplace => UpperEntry::Nothing,
                        };
                        let expected = if from_below {
                            UpperEntry::Whiteout
                        } else {
                            UpperEntry::Nothing
                        };
                        assert_eq!(left, expected, "{from:?} {upper:?} {moved:?}");
                        assert_eq!(plan.make_opaque, moved == MovedObject::Directory && below);
                    }
                }
            }
        }
    }
}
