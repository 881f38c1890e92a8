//! Registrations of backing files with the kernel, by their ids.
//!
//! The type of `fuser` for a registration ends it when it is dropped, and cannot be created from an id outside of a
//! reply. But the id of a registration must survive this process: while an inode is open by passthrough, the kernel
//! accepts no other id for it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowl_layers::sys::fuse_device;
use fuser::{BackingId, FileAttr, FileHandle, FopenFlags, Generation, ReplyCreate, ReplyOpen};

/// The FUSE device at which files are registered.
#[derive(Debug)]
pub(in crate::fuse) struct BackingDevice {
    device: OwnedFd,
    /// Whether the registrations belong to this process. Until it has taken over, they belong to its predecessor.
    is_owned: AtomicBool,
}

/// A registered backing file. Dropping it ends the registration.
#[derive(Debug)]
pub(in crate::fuse) struct Backing {
    id: u32,
    device: Arc<BackingDevice>,
}

impl BackingDevice {
    /// The device of a new session.
    pub(in crate::fuse) fn new(device: OwnedFd) -> Self {
        Self {
            device,
            is_owned: AtomicBool::new(true),
        }
    }

    /// The device of a predecessor's session.
    pub(in crate::fuse) fn of_predecessor(device: OwnedFd) -> Self {
        Self {
            device,
            is_owned: AtomicBool::new(false),
        }
    }

    /// Makes the registrations those of this process, whose predecessor has ended.
    pub(in crate::fuse) fn assume(&self) {
        self.is_owned.store(true, Ordering::Release);
    }
}

impl Backing {
    /// Registers a file.
    pub(super) fn register(device: &Arc<BackingDevice>, file: impl AsFd) -> io::Result<Self> {
        let id = BackingId::create_raw(&device.device, file)?;
        Ok(Self::registered(device, id))
    }

    /// Returns the registration with this id, which the predecessor has created.
    pub(super) fn registered(device: &Arc<BackingDevice>, id: u32) -> Self {
        Self {
            id,
            device: device.clone(),
        }
    }

    /// Returns the id of the registration.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Answers an OPEN request.
    pub(in crate::fuse) fn reply_opened(
        &self,
        reply: ReplyOpen,
        fh: FileHandle,
        flags: FopenFlags,
    ) {
        // SAFETY: the id is registered until `self` is dropped, and `into_raw` below forgets the second owner.
        let id = unsafe { reply.wrap_backing(self.id) };
        reply.opened_passthrough(fh, flags, &id);
        id.into_raw();
    }

    /// Answers a CREATE request.
    pub(in crate::fuse) fn reply_created(
        &self,
        reply: ReplyCreate,
        (timeout, attr, generation): (&Duration, &FileAttr, Generation),
        fh: FileHandle,
        flags: FopenFlags,
    ) {
        // SAFETY: the id is registered until `self` is dropped, and `into_raw` below forgets the second owner.
        let id = unsafe { reply.wrap_backing(self.id) };
        reply.created_passthrough(timeout, attr, generation, fh, flags, &id);
        id.into_raw();
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if self.device.is_owned.load(Ordering::Acquire)
            && let Err(error) = fuse_device::close_backing(&self.device.device, self.id)
        {
            // Without an effect at the end of the session, which ends all registrations.
            log::debug!("cannot unregister a backing file: {error}");
        }
    }
}
