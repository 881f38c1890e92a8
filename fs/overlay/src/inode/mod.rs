//! Inodes: the objects that are known from lookups, with their locations, names and counts of open files. Makes no
//! system calls.
//!
//! Lock order:
//!
//! 1. `copying` of an inode, held during a copy-up;
//! 2. `names` of a directory, held during one change of its names;
//! 3. `state` of an inode. If two are locked, the one with the lower inode number comes first. While it is held for
//!    writing, the only system calls are those that change the object's own name.

#[cfg(test)]
pub(crate) mod fixture;
mod flags;
mod identity;
mod inode_block;
mod ledger;
mod node_ids;
mod object;
mod place;
mod record;
mod shards;
mod state;
mod substitutes;
mod table;
mod table_record;
mod times;
mod unlocated;
mod values;

pub use flags::{Facts, FactsSnapshot, Flags};
pub(crate) use flags::{NO_CAPABILITIES, PLAIN_DATA};
pub use identity::Identity;
pub(crate) use inode_block::{InodeBlock, NamesIn, has_one_name, has_only_other_names};
pub(crate) use ledger::{CopyingTimes, Nameless};
pub(crate) use node_ids::NodeIdsRecord;
pub(crate) use object::{Alias, DirState, FileState, InodeState};
pub use object::{Inode, OpenOptions, while_content_stays};
pub(crate) use place::{DirPlace, EntryName, NamelessFile, ObjectPlace, Place, References};
pub(crate) use record::InodeRecord;
pub use shards::InodeTable;
pub(crate) use state::{is_file_where, is_in_any};
pub(crate) use substitutes::{SubstitutesRecord, is_substitute};
pub(crate) use table::{NumberStorage, OnConflict};
pub(crate) use table_record::{TableRecord, continue_numbers, restore_node_ids};
pub(crate) use times::{held_ctime, take_ended_overrides};
pub use unlocated::Unlocated;
pub(crate) use unlocated::{FoundState, Whereabouts, adopt};
pub(crate) use values::{NodeIdValue, NumberValue, encode};
