//! The state that a removal or a rename must leave: pure values, decided in one place.

use cowl_layers::sys::node::RenameMode;

/// The upper layer's entry under a name.
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
    /// The upper's entry.
    pub upper: UpperEntry,
    /// Whether something would show if the upper had nothing.
    pub below: bool,
}

/// The way to remove a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovePlan {
    /// It is in the upper only: remove it there.
    Remove,
    /// It is below only: make a whiteout.
    Hide,
    /// It is in both: a whiteout takes its place in one step.
    ReplaceByWhiteout,
    /// There is no such name.
    Absent,
}

/// Decides how a name is removed.
pub fn remove(name: NameState) -> RemovePlan {
    match (name.upper, name.below) {
        (UpperEntry::Object, true) => RemovePlan::ReplaceByWhiteout,
        (UpperEntry::Object, false) => RemovePlan::Remove,
        (UpperEntry::Nothing, true) => RemovePlan::Hide,
        (UpperEntry::Nothing, false) | (UpperEntry::Whiteout, _) => RemovePlan::Absent,
    }
}

/// The way to rename an object in the upper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenamePlan {
    /// The system call.
    pub how: RenameMode,
    /// A whiteout that the exchange moved to the old name must be removed: it hides nothing there.
    pub drop_whiteout: bool,
    /// The object is a directory that would merge with one below the new name: it must be made opaque before.
    pub make_opaque: bool,
}

/// The type of a moved object, as far as a rename depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MovedObject {
    /// It is not a directory.
    NotDirectory,
    /// A directory whose redirect gives the directories below that it merges with.
    MergedDirectory,
    /// A directory in the upper alone, which would merge with one below the new name.
    Directory,
}

/// Decides how an object that lies in the upper under `from` gets the name `to`, replacing the object there.
pub fn rename(from: NameState, to: NameState, moved: MovedObject) -> RenamePlan {
    let is_dir = moved != MovedObject::NotDirectory;
    let (how, drop_whiteout) = match (from.below, to.upper) {
        // The old name needs a whiteout, and there is one at the new name.
        (true, UpperEntry::Whiteout) => (RenameMode::Exchange, false),
        (true, UpperEntry::Nothing | UpperEntry::Object) => (RenameMode::Whiteout, false),
        // A directory cannot replace a whiteout, which is not a directory.
        (false, UpperEntry::Whiteout) if is_dir => (RenameMode::Exchange, true),
        (false, _) => (RenameMode::Replace, false),
    };
    RenamePlan {
        how,
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
    fn after_a_removal_nothing_shows_and_nothing_is_left_for_nothing() {
        for upper in UPPERS {
            for below in [false, true] {
                let plan = remove(NameState { upper, below });
                let whiteout = matches!(plan, RemovePlan::Hide | RemovePlan::ReplaceByWhiteout);
                if upper == UpperEntry::Whiteout {
                    assert_eq!(plan, RemovePlan::Absent);
                } else {
                    assert_eq!(whiteout, below);
                }
                assert_eq!(
                    matches!(plan, RemovePlan::Remove | RemovePlan::ReplaceByWhiteout),
                    upper == UpperEntry::Object
                );
            }
        }
    }

    #[test]
    fn after_a_rename_the_old_name_is_hidden_exactly_when_something_is_below() {
        for from_below in [false, true] {
            for upper in UPPERS {
                for below in [false, true] {
                    for moved in [MovedObject::NotDirectory, MovedObject::Directory] {
                        let from = NameState {
                            upper: UpperEntry::Object,
                            below: from_below,
                        };
                        let plan = rename(from, NameState { upper, below }, moved);
                        // What lies at the old name afterwards.
                        let left = match plan.how {
                            RenameMode::Whiteout => UpperEntry::Whiteout,
                            RenameMode::Exchange if plan.drop_whiteout => UpperEntry::Nothing,
                            RenameMode::Exchange => upper,
                            RenameMode::Replace | RenameMode::NoReplace => UpperEntry::Nothing,
                        };
                        let wanted = if from_below {
                            UpperEntry::Whiteout
                        } else {
                            UpperEntry::Nothing
                        };
                        assert_eq!(left, wanted, "{from:?} {upper:?} {moved:?}");
                        assert_eq!(plan.make_opaque, moved == MovedObject::Directory && below);
                    }
                }
            }
        }
    }
}
