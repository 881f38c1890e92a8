//! The services of an operation and their dependencies on one another, assembled in one module.

use crate::change::{Create, Link, NameRemoval, Redirects, Remove, Rename, UpperNames};
use crate::content::Content;
use crate::copy_up::CopyUp;
use crate::listing::ReadDir;
use crate::metadata::{Attributes, SetAttributes, Xattrs};
use crate::names::{Links, Names};
use crate::overlay::Overlay;
use crate::reach::Context;

/// A factory for the services of one operation. Each service is a few references, created when it is used.
#[derive(Clone, Copy)]
pub(crate) struct Services<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) overlay: &'o Overlay,
}

impl<'o> Services<'o> {
    pub(crate) fn names(self) -> Names<'o> {
        Names {
            cx: self.cx,
            inodes: &self.overlay.inodes,
            deep: &self.overlay.deep,
            absent: &self.overlay.absent,
            prefetched: &self.overlay.prefetched,
        }
    }

    pub(crate) fn links(self) -> Links<'o> {
        Links {
            names: self.names(),
            root: &self.overlay.root,
            index: &self.overlay.links,
        }
    }

    pub(crate) fn read_dir(self) -> ReadDir<'o> {
        ReadDir {
            names: self.names(),
            listings: &self.overlay.listings,
            cookies: &self.overlay.cookies,
            walk: &self.overlay.walk,
        }
    }

    pub(crate) fn copy_up(self) -> CopyUp<'o> {
        CopyUp {
            cx: self.cx,
            inodes: &self.overlay.inodes,
            links: self.links(),
        }
    }

    pub(crate) fn content(self) -> Content<'o> {
        Content {
            cx: self.cx,
            copy_up: self.copy_up(),
            opens: &self.overlay.opens,
            descriptors: &self.overlay.descriptors,
        }
    }

    pub(crate) fn attributes(self) -> Attributes<'o> {
        Attributes {
            cx: self.cx,
            links: self.links(),
        }
    }

    pub(crate) fn set_attributes(self) -> SetAttributes<'o> {
        SetAttributes {
            cx: self.cx,
            copy_up: self.copy_up(),
            content: self.content(),
            attributes: self.attributes(),
        }
    }

    pub(crate) fn xattrs(self) -> Xattrs<'o> {
        Xattrs {
            cx: self.cx,
            copy_up: self.copy_up(),
            opens: &self.overlay.opens,
        }
    }

    fn upper_names(self) -> UpperNames<'o> {
        UpperNames {
            cx: self.cx,
            names: self.names(),
        }
    }

    fn redirects(self) -> Redirects<'o> {
        Redirects {
            cx: self.cx,
            copy_up: self.copy_up(),
            index: &self.overlay.links,
        }
    }

    fn name_removal(self) -> NameRemoval<'o> {
        NameRemoval {
            cx: self.cx,
            inodes: &self.overlay.inodes,
            copy_up: self.copy_up(),
        }
    }

    pub(crate) fn create(self) -> Create<'o> {
        Create {
            cx: self.cx,
            upper_names: self.upper_names(),
            copy_up: self.copy_up(),
            content: self.content(),
            attributes: self.attributes(),
        }
    }

    pub(crate) fn link(self) -> Link<'o> {
        Link {
            cx: self.cx,
            upper_names: self.upper_names(),
            copy_up: self.copy_up(),
            redirects: self.redirects(),
        }
    }

    pub(crate) fn remove(self) -> Remove<'o> {
        Remove {
            cx: self.cx,
            names: self.names(),
            upper_names: self.upper_names(),
            copy_up: self.copy_up(),
            name_removal: self.name_removal(),
            index: &self.overlay.links,
        }
    }

    pub(crate) fn rename(self) -> Rename<'o> {
        Rename {
            cx: self.cx,
            inodes: &self.overlay.inodes,
            names: self.names(),
            upper_names: self.upper_names(),
            copy_up: self.copy_up(),
            redirects: self.redirects(),
            name_removal: self.name_removal(),
            index: &self.overlay.links,
        }
    }
}
