//! Attributes of objects, as stat(2) on the mount returns them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::inode::{FileState, Inode};
use crate::names::{Hit, Links, UNCOUNTED};
use crate::reach::{Attempt, Context, retry_while_moved};
use cowl_layers::error::Result;
use cowl_layers::layer::zero_device;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};

/// The attributes that stat(2) on the mount returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The inode number.
    pub ino: u64,
    /// All other attributes, with mapped ids. `dev` and `ino` in it are those of the layer.
    pub stat: Stat,
}

/// Read access to attributes.
#[derive(Clone, Copy)]
pub(crate) struct Attributes<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) links: Links<'o>,
}

impl Attributes<'_> {
    /// Looks up `name` in `parent`, and returns the object with its attributes.
    pub(crate) fn lookup(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<(Arc<Inode>, Attr)>> {
        let Some(Hit { inode, stat, .. }) = self.links.names.lookup_with_stat(parent, name)? else {
            return Ok(None);
        };
        let attr = self.attr_as_found(&inode, stat)?;
        Ok(Some((inode, attr)))
    }

    /// Returns the attributes of an object that was just found or created, with `stat` on disk.
    ///
    /// Reads the attributes again only if a copy-up affects the times, or the visible links must be counted.
    pub(crate) fn attr_as_found(&self, inode: &Arc<Inode>, stat: Stat) -> Result<Attr> {
        let plain = inode.is_dir() || stat.nlink == 1 || self.cx.options.static_nlink;
        if plain && !inode.had_times_override() {
            Ok(self.attr_from_stat(inode, stat))
        } else {
            self.attr(inode)
        }
    }

    /// Returns the attributes of an object.
    pub(crate) fn attr(&self, inode: &Arc<Inode>) -> Result<Attr> {
        let read = || {
            if inode.is_dir() {
                dir_stat(inode)
            } else {
                self.file_stat(inode)
            }
        };
        let mut version = inode.times_version();
        let mut stat = read()?;
        // Retry after a race with a copy-up: times that were read during it are invalid after it.
        while version != inode.times_version() {
            version = inode.times_version();
            stat = read()?;
        }
        // Passthrough writes bypass this process. They set mtime and ctime to the same value, whereas a copy-up
        // restores mtime; so only unequal times can be from a copy-up.
        if inode.kind() != FileKind::Regular || stat.mtime != stat.ctime {
            stat.ctime = inode.visible_ctime(stat.ctime);
        }
        stat.mtime = inode.visible_mtime(stat.mtime);
        Ok(self.attr_from_stat(inode, stat))
    }

    /// Returns the attributes of an open file that has no known location, with those on disk of its content.
    pub(crate) fn attr_of_content(&self, inode: &Inode, fd: &OwnedFd) -> Result<Attr> {
        Ok(self.attr_from_stat(inode, sys::stat::stat_fd(fd)?))
    }

    /// Converts `stat`, in which links and times are already those to report: maps ids and adds the inode number.
    fn attr_from_stat(&self, inode: &Inode, mut stat: Stat) -> Attr {
        let ids = self.cx.options;
        stat.uid = ids.uids.to_mount(stat.uid);
        stat.gid = ids.gids.to_mount(stat.gid);
        if ids.static_nlink && !inode.is_dir() {
            stat.nlink = 1;
        }
        Attr {
            ino: inode.ino(),
            stat,
        }
    }

    fn file_stat(&self, inode: &Arc<Inode>) -> Result<Stat> {
        retry_while_moved(inode, |file| {
            let stat = match &file.anchor {
                Some(anchor) => sys::stat::stat_fd(&**anchor),
                None => file.loc.stat(),
            };
            let mut stat = match stat {
                Err(error) if error.is_absent() => return Ok(Attempt::OtherObject),
                other => other?,
            };
            if file.anchor.is_none() && stat.ino != file.identity.ino {
                return Ok(Attempt::OtherObject);
            }
            if stat.kind() != inode.kind() {
                stat = zero_device::device_stat(stat);
            }
            if let Some(data) = &file.data {
                stat.blocks = data.stat()?.blocks;
            }
            if file.orphan {
                stat.nlink = 0;
            } else if self.cx.options.static_nlink {
                stat.nlink = 1;
            } else if stat.nlink > 1 {
                stat.nlink = self.visible_links(inode, &file, stat.nlink)?;
            }
            Ok(Attempt::Done(stat))
        })
    }

    /// Returns the number of visible names of a file with several links.
    ///
    /// A layer above the file's may hide some names, which the link count on disk does not reflect. For a layer that
    /// another mount writes to, that count is returned: that mount copies a file up before it hides one of its names, and
    /// a cached number could become stale.
    fn visible_links(&self, inode: &Arc<Inode>, file: &FileState, on_disk: u64) -> Result<u64> {
        if self.cx.stack.is_in_upper(file) || self.cx.options.live_layers {
            return Ok(on_disk);
        }
        if let Some(visible) = file.visible {
            return Ok(visible.get());
        }
        let visible = self.links.visible_names(inode, file)?.len() as u64;
        inode.update_file(|now| now.note_visible_names(file.identity, visible))?;
        Ok(visible)
    }
}

fn dir_stat(inode: &Inode) -> Result<Stat> {
    let dir = inode.dir()?;
    let mut stat = sys::stat::stat_fd(&*dir.top()?.fd()?)?;
    if dir.removed {
        stat.nlink = 0;
    } else if dir.locs.len() > 1 {
        stat.nlink = UNCOUNTED;
    }
    Ok(stat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Overlay, OverlayOptions};
    use cowl_layers::format::XattrSpace;
    use cowl_layers::layer::{Layer, Upper};

    /// Reproduces a race: links are counted in the lower layer, but the count is recorded after a copy-up.
    #[test]
    fn stale_link_count_is_not_used_after_a_copy_up() {
        let top = tempfile::tempdir().unwrap();
        let space = XattrSpace::detect();
        let at = |name: &str| top.path().join(name);
        let upper = |dir: &str, work: &str| {
            std::fs::create_dir(at(dir)).unwrap();
            std::fs::create_dir(at(work)).unwrap();
            Upper::open(&at(dir), &at(work), space).unwrap()
        };
        std::fs::create_dir(at("lower")).unwrap();
        std::fs::write(at("lower/a"), "text").unwrap();
        for name in ["b", "c", "d"] {
            std::fs::hard_link(at("lower/a"), at("lower").join(name)).unwrap();
        }
        let lower = Layer::open(&at("lower"), space).unwrap();
        let top_layer = Some(upper("upper", "work"));
        let overlay = Overlay::new(top_layer, vec![lower], OverlayOptions::default()).unwrap();
        let unlink = |name: &[u8]| {
            let name = Name::new(name).unwrap();
            overlay.begin().unlink(overlay.root(), &name).unwrap();
        };
        let inode = overlay.begin().lookup_path(b"a").unwrap();
        let before = inode.file().unwrap();
        unlink(b"b");
        let op = overlay.begin();
        let attributes = op.services().attributes();
        attributes.visible_links(&inode, &before, 4).unwrap();
        drop(op);
        unlink(b"c");
        overlay
            .push_layer(upper("next", "next-work"), &crate::PushRequest::default())
            .unwrap();
        assert_eq!(overlay.begin().attr(&inode).unwrap().stat.nlink, 2);
    }
}
