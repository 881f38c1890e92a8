//! Moving names.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::create::{live, lock_both, refuse_mark};
use super::plan::{self, NameState, UpperHas};
use super::remove::forget_name;
use super::stage::CopyUp;
use super::{Caller, Op};
use crate::inode::{Alias, DirState, Identity, Inode, PLAIN, State};
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::layer::{LayerDir, Moving, WhiteoutForm, zero_device};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameHow;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::Loc;

/// What renameat2(2) was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameFlags {
    /// EEXIST when the new name is taken.
    pub no_replace: bool,
    /// Swap the two.
    pub exchange: bool,
    /// Leave a character device 0:0 at the old name.
    pub whiteout: bool,
}

/// One side of a rename, with its folder's lock held.
struct Side<'a> {
    parent: &'a Arc<Inode>,
    name: &'a Name,
    dir: DirState,
    up: Arc<LayerDir>,
    state: NameState,
}

impl Op<'_> {
    /// Gives the object `name` in `parent` the name `new_name` in `new_parent`. Never EXDEV: a folder
    /// from below gets a redirect mark and moves alone.
    pub fn rename(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        new_parent: &Arc<Inode>,
        new_name: &Name,
        flags: RenameFlags,
    ) -> Result<()> {
        let inode = self.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
        let target = self.lookup(new_parent, new_name)?;
        self.check(&inode, target.as_ref(), new_parent, flags)?;
        if let Some(target) = &target
            && Arc::ptr_eq(target, &inode)
        {
            // Two names of one file, or the same name: nothing happens, says POSIX.
            return Ok(());
        }
        self.cx.stack.upper()?;
        for parent in [parent, new_parent] {
            live(parent)?;
            self.dir_up(parent)?;
        }
        let stays = Arc::ptr_eq(parent, new_parent);
        self.bring_for_move(&inode, stays)?;
        match &target {
            Some(target) if flags.exchange => self.bring_for_move(target, stays)?,
            Some(target) if !target.is_dir() => self.gather_links(target)?,
            _ => {}
        }
        let _names = lock_both(parent, new_parent);
        let from = self.side(parent, name)?;
        let to = self.side(new_parent, new_name)?;
        refuse_mark(&to.up, new_name)?;
        self.ready_for(&inode, (*to.up.fd()?).as_fd())?;
        if flags.exchange {
            let target = target.ok_or(Error::NOT_FOUND)?;
            self.ready_for(&target, (*from.up.fd()?).as_fd())?;
            return self.exchange(&from, &to, &inode, &target);
        }
        if !flags.whiteout {
            return self.replace(&from, &to, &inode, target.as_ref());
        }
        // Made before anything moves, because it may fail, and so may the folder's mark. Between the
        // two steps the old name is absent: a power cut there leaves a file that was moved and a name
        // that is not hidden, and no order of the steps leaves less.
        let device = self.stage_zero_device(caller, &from.up, 0)?;
        zero_device::mark_folder(
            (*from.up.fd()?).as_fd(),
            self.cx.stack.upper()?.layer.space(),
        )?;
        self.replace(&from, &to, &inode, target.as_ref())?;
        self.commit_zero_device(device, &from.up, name)
    }

    fn check(
        &self,
        inode: &Arc<Inode>,
        target: Option<&Arc<Inode>>,
        new_parent: &Arc<Inode>,
        flags: RenameFlags,
    ) -> Result<()> {
        if flags.exchange && (flags.no_replace || flags.whiteout) {
            return Err(Error::Errno(Errno::INVAL));
        }
        if inode.is_dir() && is_below(new_parent, inode)? {
            return Err(Error::Errno(Errno::INVAL));
        }
        let Some(target) = target else {
            return if flags.exchange {
                Err(Error::NOT_FOUND)
            } else {
                Ok(())
            };
        };
        if flags.no_replace {
            return Err(Error::Errno(Errno::EXIST));
        }
        if flags.exchange || Arc::ptr_eq(inode, target) {
            return Ok(());
        }
        match (inode.is_dir(), target.is_dir()) {
            (true, false) => Err(Error::Errno(Errno::NOTDIR)),
            (false, true) => Err(Error::Errno(Errno::ISDIR)),
            (true, true) if !self.shows_nothing(target)? => Err(Error::Errno(Errno::NOTEMPTY)),
            _ => Ok(()),
        }
    }

    /// Brings an object up and marks on it where the layers below have it. `stays`: it is renamed within
    /// its folder.
    fn bring_for_move(&self, inode: &Arc<Inode>, stays: bool) -> Result<()> {
        if !inode.is_dir() {
            self.file_up(inode, CopyUp::Metadata)?;
            return self.anchor_redirect(inode);
        }
        let (dir, up) = self.dir_up(inode)?;
        if dir.locs.len() < 2 || matches!(dir.redirect, Some(Redirect::Path(_))) {
            return Ok(());
        }
        let mut redirect = Redirect::Path(self.path_below(inode)?.into());
        let mark = self.cx.stack.upper()?.layer.space().redirect().as_bytes();
        let set = |value: &Redirect| sys::xattr::set((*up.fd()?).as_fd(), mark, &value.to_value());
        match set(&redirect) {
            Ok(()) => {}
            // A path of thousands of bytes does not fit. Within the folder its old name says as much;
            // elsewhere there is no way, and programs copy when they see this.
            Err(Error::Errno(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE)) if stays => {
                redirect = match (dir.redirect, dir.alias) {
                    (Some(sibling @ Redirect::Sibling(_)), _) => sibling,
                    (_, Some(alias)) => Redirect::Sibling(alias.name),
                    (_, None) => return Err(Error::NOT_FOUND),
                };
                set(&redirect)?;
            }
            Err(Error::Errno(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE)) => {
                return Err(Error::Errno(Errno::XDEV));
            }
            Err(error) => return Err(error),
        }
        inode.change_dir(|dir| dir.redirect = Some(redirect))?;
        self.overlay.links.note_moved(inode);
        Ok(())
    }

    fn side<'a>(&self, parent: &'a Arc<Inode>, name: &'a Name) -> Result<Side<'a>> {
        let dir = live(parent)?;
        let up = self
            .cx
            .stack
            .upper_dir(&dir)
            .cloned()
            .ok_or(Error::NOT_FOUND)?;
        let state = self.name_state(&dir, &up, name)?;
        Ok(Side {
            parent,
            name,
            dir,
            up,
            state,
        })
    }

    fn replace(
        &self,
        from: &Side<'_>,
        to: &Side<'_>,
        inode: &Arc<Inode>,
        target: Option<&Arc<Inode>>,
    ) -> Result<()> {
        if from.state.upper != UpperHas::Object {
            return Err(Error::NOT_FOUND);
        }
        let anchored = !inode.is_dir() || inode.dir()?.locs.len() > 1;
        let plan = plan::rename(from.state, to.state, inode.is_dir(), anchored);
        let (from_fd, to_fd) = (from.up.fd()?, to.up.fd()?);
        let (from_fd, to_fd) = ((*from_fd).as_fd(), (*to_fd).as_fd());
        if plan.make_opaque {
            self.set_opaque((*inode.dir()?.top()?.fd()?).as_fd())?;
        }
        let gone = self.prepare_target(to, target)?;
        let moved_dir = self.place_of(inode)?;
        let target_dir = match target {
            Some(target) => self.place_of(target)?,
            None => None,
        };
        let upper = self.cx.stack.upper()?;
        if plan.how == RenameHow::Exchange && !plan.drop_whiteout {
            // The whiteout of the new name comes to lie in the old name's folder.
            upper.ready_for_whiteout(from_fd, to_fd, to.name)?;
        }
        if let Some(target) = target {
            let unseen = to.state.upper != UpperHas::Object || plan.how == RenameHow::Exchange;
            self.write_back_before_replacing(inode, target, unseen)?;
        }
        let two_steps =
            plan.how == RenameHow::Whiteout && upper.whiteout_form() == WhiteoutForm::MarkedFile;
        let call = || -> Result<()> {
            if two_steps {
                self.leave_whiteout_by_exchange(from, to)?;
            } else {
                match sys::node::rename(from_fd, from.name, to_fd, to.name, plan.how) {
                    Err(Error::Errno(Errno::INVAL | Errno::NOSYS))
                        if plan.how == RenameHow::Whiteout =>
                    {
                        self.leave_whiteout_by_exchange(from, to)?;
                    }
                    // The kernel makes an inode for the whiteout; a link to the shared one needs none.
                    Err(Error::Errno(Errno::NOSPC | Errno::DQUOT))
                        if plan.how == RenameHow::Whiteout =>
                    {
                        self.leave_linked_whiteout(from, to)?;
                    }
                    other => other?,
                }
            }
            if plan.drop_whiteout
                && let Err(error) = sys::node::unlink(from_fd, from.name)
            {
                // The move is made, and the whiteout hides nothing.
                log::warn!("cannot remove the whiteout {}: {error}", from.name);
            }
            Ok(())
        };
        inode.change_name(target.map(|target| &**target), |state, others| {
            let moving = moved_dir.as_ref().map(|dir| dir.moving());
            let going = target_dir.as_ref().map(|dir| dir.moving());
            call()?;
            if let (Some(going), Some(fd)) = (going, &gone) {
                going.gone(fd.clone());
            }
            match others {
                Some(state @ State::Dir(_)) => state.removed(),
                Some(state) => forget_name(state, to.parent, to.name, gone)?,
                None => {}
            }
            note_moved(state, moving, from, to);
            Ok(())
        })?;
        // A library is known by its name.
        inode.unknown(PLAIN);
        for changed in [inode, from.parent, to.parent].into_iter().chain(target) {
            changed.changed();
        }
        if let Some(target) = target {
            self.overlay.links.note_removed(target);
            self.note_gone(target);
        }
        Ok(())
    }

    /// Starts write-back of a file that is about to be renamed over another, as the file system below does
    /// where it can see that. `unseen`: it cannot, because the target lies in a lower layer.
    fn write_back_before_replacing(
        &self,
        moved: &Inode,
        target: &Inode,
        unseen: bool,
    ) -> Result<()> {
        let regular = |inode: &Inode| inode.kind() == FileKind::Regular;
        if !unseen || !self.cx.early()?.on_replace || !regular(moved) || !regular(target) {
            return Ok(());
        }
        let file = moved.file()?;
        if file.data.is_some() {
            // Its content lies below, and is on the disk.
            return Ok(());
        }
        match reach::open_content(moved, OFlags::RDONLY) {
            Ok(content) => sys::early::start(content),
            Err(error) => log::debug!("cannot start write-back before a rename: {error}"),
        }
        Ok(())
    }

    /// A folder's own place in the upper.
    fn place_of(&self, inode: &Inode) -> Result<Option<Arc<LayerDir>>> {
        if !inode.is_dir() {
            return Ok(None);
        }
        Ok(self.cx.stack.upper_dir(&inode.dir()?).cloned())
    }

    /// RENAME_WHITEOUT on a file system without it: the whiteout is put at the new name first, where
    /// it changes nothing or replaces what is to be replaced, and then the two are swapped.
    fn leave_whiteout_by_exchange(&self, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
        let (from_fd, to_fd) = (from.up.fd()?, to.up.fd()?);
        let (from_fd, to_fd) = ((*from_fd).as_fd(), (*to_fd).as_fd());
        let whiteout = self.cx.stack.upper()?.stage_whiteout(from_fd)?;
        let how = match to.state.upper {
            UpperHas::Nothing => RenameHow::NoReplace,
            UpperHas::Whiteout | UpperHas::Object => RenameHow::Exchange,
        };
        whiteout.commit(to_fd, to.name, how)?;
        sys::node::rename(from_fd, from.name, to_fd, to.name, RenameHow::Exchange)
    }

    /// RENAME_WHITEOUT on a full disk. In steps: a power cut between them leaves what is replaced, or what was
    /// moved, under the old name as well.
    fn leave_linked_whiteout(&self, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
        let (from_fd, to_fd) = (from.up.fd()?, to.up.fd()?);
        let (from_fd, to_fd) = ((*from_fd).as_fd(), (*to_fd).as_fd());
        let upper = self.cx.stack.upper()?;
        let exchange = || {
            let how = RenameHow::Exchange;
            sys::node::rename(from_fd, from.name, to_fd, to.name, how)
        };
        let or_back = |done: Result<()>, back: &dyn Fn() -> Result<()>| {
            if done.is_err()
                && let Err(error) = back()
            {
                log::error!(
                    "{} cannot be renamed back to {}: {error}",
                    to.name,
                    from.name
                );
            }
            done
        };
        match to.state.upper {
            UpperHas::Whiteout => self.leave_whiteout_by_exchange(from, to),
            UpperHas::Nothing if !to.state.below => self.leave_whiteout_by_exchange(from, to),
            UpperHas::Nothing => {
                let how = RenameHow::NoReplace;
                sys::node::rename(from_fd, from.name, to_fd, to.name, how)?;
                let back = || sys::node::rename(to_fd, to.name, from_fd, from.name, how);
                or_back(upper.whiteout_new(from_fd, from.name), &back)
            }
            UpperHas::Object => {
                let whiteout = upper.stage_whiteout(from_fd)?;
                exchange()?;
                // What was replaced goes with the staged name.
                let done = whiteout.commit(from_fd, from.name, RenameHow::Exchange);
                or_back(done, &exchange)
            }
        }
    }

    /// A folder that is to be replaced must be empty on disk too, not only to the eye: its whiteouts go
    /// by swapping it for an empty, opaque one, which shows the same. Returns what keeps the old one.
    fn prepare_target(
        &self,
        to: &Side<'_>,
        target: Option<&Arc<Inode>>,
    ) -> Result<Option<Arc<std::os::fd::OwnedFd>>> {
        let Some(target) = target else {
            return Ok(None);
        };
        if !target.is_dir() {
            return self.keeper(target, to.parent, to.name);
        }
        let dir = target.dir()?;
        let Some(up) = self.cx.stack.upper_dir(&dir) else {
            return Ok(None);
        };
        let fd = up.fd()?;
        if sys::dir::entries((*fd).as_fd())?.is_empty() {
            return Ok(Some(fd));
        }
        let (empty, stat) = self.stage_dir(up)?;
        let kept = empty.open_path()?;
        self.set_opaque(kept.as_fd())?;
        let to_fd = to.up.fd()?;
        empty.commit((*to_fd).as_fd(), to.name, RenameHow::Exchange)?;
        // Told at once: the rename that comes next may fail.
        let place = LayerDir::child(&to.up, to.name.clone(), stat.ino);
        let identity = Identity::of(&stat);
        self.overlay.inodes.moving(target, identity, true, || {
            target.change_dir(|dir| {
                dir.locs = Arc::from([place]);
                dir.redirect = None;
                dir.identity = identity;
            })
        })?;
        Ok(Some(Arc::new(kept)))
    }

    fn exchange(
        &self,
        from: &Side<'_>,
        to: &Side<'_>,
        inode: &Arc<Inode>,
        target: &Arc<Inode>,
    ) -> Result<()> {
        for (moved, there) in [(inode, to), (target, from)] {
            // A folder that is in the upper alone must not merge with what lies below its new name.
            if moved.is_dir() && moved.dir()?.locs.len() == 1 && there.dir.locs.len() > 1 {
                self.set_opaque((*moved.dir()?.top()?.fd()?).as_fd())?;
            }
        }
        let (from_fd, to_fd) = (from.up.fd()?, to.up.fd()?);
        let places = (self.place_of(inode)?, self.place_of(target)?);
        inode.change_name(Some(target), |state, others| {
            let one = places.0.as_ref().map(|dir| dir.moving());
            let two = places.1.as_ref().map(|dir| dir.moving());
            sys::node::rename(
                (*from_fd).as_fd(),
                from.name,
                (*to_fd).as_fd(),
                to.name,
                RenameHow::Exchange,
            )?;
            note_moved(state, one, from, to);
            if let Some(state) = others {
                note_moved(state, two, to, from);
            }
            Ok(())
        })?;
        for moved in [inode, target] {
            moved.unknown(PLAIN);
        }
        for changed in [inode, target, from.parent, to.parent] {
            changed.changed();
        }
        Ok(())
    }
}

/// Tells an object its new name, and where in the upper it lies now.
fn note_moved(state: &mut State, place: Option<Moving<'_>>, from: &Side<'_>, to: &Side<'_>) {
    let alias = Alias {
        parent: to.parent.clone(),
        name: to.name.clone(),
    };
    if let Some(place) = place {
        place.to(&to.up, to.name.clone());
    }
    match state {
        State::Dir(dir) => dir.alias = Some(alias),
        State::File(file) => {
            file.aliases
                .retain(|a| !(a.name == *from.name && Arc::ptr_eq(&a.parent, from.parent)));
            file.aliases.push(alias);
            file.loc = Loc {
                dir: to.up.clone(),
                name: to.name.clone(),
            };
        }
    }
}

/// Whether `inode` is `ancestor` or lies below it.
fn is_below(inode: &Arc<Inode>, ancestor: &Arc<Inode>) -> Result<bool> {
    let mut next = Some(inode.clone());
    while let Some(inode) = next {
        if Arc::ptr_eq(&inode, ancestor) {
            return Ok(true);
        }
        next = inode.dir()?.alias.map(|alias| alias.parent);
    }
    Ok(false)
}
