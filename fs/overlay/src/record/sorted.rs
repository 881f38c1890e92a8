//! The values of a ledger by type, and the inodes that must be located before the first request.

use std::collections::{BTreeSet, HashMap};

use crate::inode::{
    CopyingTimes, EntryName, Identity, NamesIn, NodeIdValue, NumberValue, Place, SubstitutesRecord,
    TableRecord, has_one_name, has_only_other_names, is_substitute,
};
use crate::ledger::{Change, Kind, LedgerContent, Word};
use crate::listing::CookiesRecord;

/// The values of a ledger, by type.
#[derive(Default)]
pub(super) struct Sorted {
    pub(super) nameless: HashMap<u64, Place>,
    pub(super) copying: HashMap<u64, CopyingTimes>,
    pub(super) table: TableRecord,
    pub(super) cookies: CookiesRecord,
    pub(super) handles: Vec<(u64, Vec<u8>)>,
    pub(super) backing: Vec<(u64, Vec<u8>)>,
    /// The capabilities of files that were being written to.
    pub(super) capabilities: Vec<(u64, Vec<u8>)>,
    /// The inodes that must be located at once, because more than their recorded names is needed for it, or because
    /// the table needs their identities.
    pub(super) eager: BTreeSet<u64>,
}

impl Sorted {
    /// Decodes the values; `None` if one is damaged.
    pub(super) fn new(content: &LedgerContent) -> Option<Self> {
        let mut sorted = Self::default();
        let mut substitutes = SubstitutesRecord {
            assigned: content.word(Word::Substitutes),
            is_reused: content.word(Word::Reused) != 0,
            ..SubstitutesRecord::default()
        };
        sorted.table.node_ids.assigned = content.word(Word::NodeIds);
        sorted.cookies.key = [content.word(Word::Key0), content.word(Word::Key1)];
        for (kind, key, bytes) in content.values() {
            let bytes = &*bytes;
            match kind {
                Kind::Number => {
                    let NumberValue { dev, ino, number } = postcard::from_bytes(bytes).ok()?;
                    substitutes.numbers.insert(Identity { dev, ino }, number);
                }
                Kind::NodeId => {
                    let value: NodeIdValue = postcard::from_bytes(bytes).ok()?;
                    let ids = &mut sorted.table.node_ids;
                    ids.inodes.insert(key, (value.ino, value.lookups));
                    if value.is_newest {
                        ids.newest.insert(value.ino, key);
                    }
                    sorted.eager.insert(value.ino);
                }
                Kind::Ctime => {
                    let (real, shown) = postcard::from_bytes(bytes).ok()?;
                    sorted.table.ctimes.push((key, real, shown));
                }
                Kind::Copying => {
                    sorted
                        .copying
                        .insert(key, postcard::from_bytes(bytes).ok()?);
                }
                Kind::Nameless => {
                    sorted
                        .nameless
                        .insert(key, postcard::from_bytes(bytes).ok()?);
                }
                Kind::Collision => {
                    let (place, names) = postcard::from_bytes(bytes).ok()?;
                    sorted.cookies.names.insert(place, names);
                }
                Kind::Handle => sorted.handles.push((key, bytes.to_vec())),
                Kind::Backing => sorted.backing.push((key, bytes.to_vec())),
                Kind::Capabilities => {
                    sorted.capabilities.push((key, bytes.to_vec()));
                    sorted.eager.insert(key);
                }
                Kind::Stack | Kind::Inode => {}
            }
        }
        sorted.table.substitutes = substitutes;
        sorted.eager.insert(1);
        sorted.eager.extend(sorted.nameless.keys());
        sorted.eager.extend(sorted.copying.keys());
        sorted
            .eager
            .extend(content.slots.iter().map(|(_, slot)| slot.object));
        let names = names_in_requests(content);
        let mut payload = Vec::new();
        for (ino, block) in &content.inodes {
            // Most blocks need not be read.
            let is_plain = names.is_empty() && has_one_name(content.first_byte(*block));
            if !is_plain {
                content.payload(*block, &mut payload);
            }
            if is_substitute(*ino) || !is_plain && !has_only_other_names(&payload, &names)? {
                sorted.eager.insert(*ino);
            }
        }
        Some(sorted)
    }
}

/// Returns the names that requests in progress change.
fn names_in_requests(content: &LedgerContent) -> NamesIn {
    let mut names = NamesIn::default();
    let requests = content.slots.iter().map(|(_, slot)| slot);
    for slot in requests.filter(|slot| slot.change.is_some()) {
        let (one, two) = slot.names.clone();
        names.entry(slot.parents.0).or_default().push(one);
        names.entry(slot.parents.1).or_default().push(two);
    }
    names
}

/// Returns the names that a rename in progress may have given to objects: from the number of the object, and from the
/// name that it had.
pub(super) fn renames(content: &LedgerContent) -> Renames {
    let mut renames = Renames::default();
    for (_, slot) in &content.slots {
        let from = (slot.parents.0, slot.names.0.clone());
        let to = (slot.parents.1, slot.names.1.clone());
        match slot.change {
            Some(Change::Rename) => {
                renames.of_objects.insert(slot.object, to);
            }
            Some(Change::Exchange) => {
                renames.of_names.insert(to.clone(), from);
                renames.of_objects.insert(slot.object, to);
            }
            _ => {}
        }
    }
    renames
}

#[derive(Default)]
pub(super) struct Renames {
    pub(super) of_objects: HashMap<u64, EntryName>,
    pub(super) of_names: HashMap<EntryName, EntryName>,
}
