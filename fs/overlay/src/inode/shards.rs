//! The structure of the table of known inodes.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use cowl_layers::locks::Mutex;
use cowl_layers::sys::stat::Time;
use lru::LruCache;
use rustc_hash::FxHashMap;

use super::inode_block::is_named_dir;
use super::node_ids::NodeIds;
use super::object::Inode;
use super::substitutes::Substitutes;
use crate::ledger::{Block, Ledger};

pub(super) const SHARDS: usize = 16;

/// An entry of the table.
#[derive(Debug)]
pub(super) enum TableEntry {
    /// The kernel does not know the inode. An operation or an open file may reference it.
    Weak(Weak<Inode>),
    /// The kernel knows the inode. A lookup count that reaches the maximum stays there, and the inode is never dropped.
    Strong { inode: Arc<Inode>, lookups: u32 },
    /// Like `Strong`, with the lookup count in the ledger.
    Recorded { inode: Arc<Inode>, block: Block },
    /// Like `Weak`, but the place is in the ledger, because the places of other inodes may refer to it.
    Faded { inode: Weak<Inode>, block: Block },
    /// A predecessor knew the inode, which is in the ledger. Its object was not located yet ([`super::unlocated`]).
    Unlocated { block: Block },
}

pub(super) type Shard = FxHashMap<u64, TableEntry>;

/// The table of known inodes.
#[derive(Debug)]
pub struct InodeTable {
    pub(super) shards: Vec<Mutex<Shard>>,
    pub(super) substitutes: Mutex<Substitutes>,
    /// The arguments of [`Inode::override_ctime`], for an inode that the kernel forgets and looks up again. A stale
    /// pair is harmless, because it applies only while the ctime on disk is the recorded one.
    pub(super) ctimes: Mutex<LruCache<u64, (Time, Time)>>,
    /// The inodes with a replacement node id.
    pub(super) node_ids: NodeIds,
    /// The number of known inodes.
    pub(super) known: AtomicUsize,
    /// The number of inodes dropped since the tables last shrank.
    pub(super) dropped: AtomicUsize,
    /// The ledger, once a successor could need it.
    pub(super) ledger: OnceLock<Arc<Ledger>>,
    /// Whether objects may not be located yet.
    pub(super) is_locating: AtomicBool,
}

impl Default for InodeTable {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            substitutes: Mutex::default(),
            ctimes: Mutex::new(LruCache::unbounded()),
            node_ids: NodeIds::default(),
            known: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            ledger: OnceLock::new(),
            is_locating: AtomicBool::new(false),
        }
    }
}

impl InodeTable {
    pub(super) fn shard(&self, ino: u64) -> &Mutex<Shard> {
        let at = usize::try_from(ino % SHARDS as u64).unwrap_or(0);
        // `at` is below SHARDS, the length.
        #[allow(clippy::indexing_slicing)]
        &self.shards[at]
    }

    /// Counts a known inode.
    pub(super) fn count_known(&self) {
        self.known.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether the places of objects that were not located yet may refer to the inode with this block.
pub(super) fn is_place_of_others(table: &InodeTable, block: Block) -> bool {
    table.is_locating.load(Ordering::Acquire)
        && (table.ledger.get()).is_some_and(|ledger| is_named_dir(ledger.first_byte(block)))
}

impl TableEntry {
    /// Returns the entry of an inode that has this block.
    pub(super) fn with_block(
        inode: &Arc<Inode>,
        block: Block,
        ledger: Option<&Arc<Ledger>>,
    ) -> Self {
        match ledger.map_or(0, |ledger| ledger.count(block)) {
            0 => Self::Faded {
                inode: Arc::downgrade(inode),
                block,
            },
            _ => Self::Recorded {
                inode: inode.clone(),
                block,
            },
        }
    }

    /// Returns the block by which the object is to be located: it was not located yet, or it is a directory that nothing
    /// in this process refers to any more, but perhaps the place of an object that was not located yet.
    pub(super) fn block_to_locate(&self, table: &InodeTable) -> Option<Block> {
        match self {
            Self::Unlocated { block } => Some(*block),
            Self::Faded { inode, block } if inode.strong_count() == 0 => {
                is_place_of_others(table, *block).then_some(*block)
            }
            _ => None,
        }
    }

    pub(super) fn living(&self) -> Option<Arc<Inode>> {
        match self {
            Self::Weak(inode) | Self::Faded { inode, .. } => inode.upgrade(),
            Self::Strong { inode, .. } | Self::Recorded { inode, .. } => Some(inode.clone()),
            Self::Unlocated { .. } => None,
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        match self {
            Self::Weak(inode) | Self::Faded { inode, .. } => inode.strong_count() > 0,
            Self::Strong { .. } | Self::Recorded { .. } | Self::Unlocated { .. } => true,
        }
    }

    /// Returns the block of the inode in the ledger.
    pub(super) fn block(&self) -> Option<Block> {
        match self {
            Self::Recorded { block, .. }
            | Self::Faded { block, .. }
            | Self::Unlocated { block } => Some(*block),
            Self::Weak(_) | Self::Strong { .. } => None,
        }
    }

    /// Subtracts `count` from the lookup count of a known inode. Returns the inode if it is zero.
    pub(super) fn subtract(
        &mut self,
        count: u64,
        ledger: Option<&Arc<Ledger>>,
    ) -> Option<Arc<Inode>> {
        let less = |lookups: u32| {
            if lookups == u32::MAX {
                return lookups;
            }
            u32::try_from(u64::from(lookups).saturating_sub(count)).unwrap_or(u32::MAX)
        };
        match self {
            Self::Strong { inode, lookups } => {
                *lookups = less(*lookups);
                if *lookups > 0 {
                    return None;
                }
                let inode = inode.clone();
                *self = Self::Weak(Arc::downgrade(&inode));
                Some(inode)
            }
            Self::Recorded { inode, block } => {
                let (ledger, block) = (ledger?, *block);
                let left = less(ledger.count(block));
                ledger.set_count(block, left);
                if left > 0 {
                    return None;
                }
                let inode = inode.clone();
                *self = Self::Faded {
                    inode: Arc::downgrade(&inode),
                    block,
                };
                Some(inode)
            }
            Self::Unlocated { block } => {
                let ledger = ledger?;
                ledger.set_count(*block, less(ledger.count(*block)));
                None
            }
            Self::Weak(_) | Self::Faded { .. } => None,
        }
    }

    /// Returns the lookup count.
    pub(super) fn lookups(&self, ledger: Option<&Arc<Ledger>>) -> u32 {
        match self {
            Self::Strong { lookups, .. } => *lookups,
            Self::Recorded { block, .. } | Self::Unlocated { block } => {
                ledger.map_or(0, |ledger| ledger.count(*block))
            }
            Self::Weak(_) | Self::Faded { .. } => 0,
        }
    }
}
