//! Locks over state that a panic must not leave half-changed.
//!
//! They are those of parking_lot, which do not poison. If a thread panics while it holds one exclusively, the process
//! aborts: another thread would see the state between two steps of a change, and could write it to a layer.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

pub use parking_lot::RwLockReadGuard;

/// A mutual exclusion lock; see the module's documentation.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(parking_lot::Mutex<T>);

/// Exclusive access to the value of a [`Mutex`].
#[must_use]
#[derive(Debug)]
pub struct MutexGuard<'a, T: ?Sized>(parking_lot::MutexGuard<'a, T>);

/// A reader-writer lock; see the module's documentation. A panic of a reader is harmless.
#[derive(Debug, Default)]
pub struct RwLock<T: ?Sized>(parking_lot::RwLock<T>);

/// Exclusive access to the value of an [`RwLock`].
#[must_use]
#[derive(Debug)]
pub struct RwLockWriteGuard<'a, T: ?Sized>(parking_lot::RwLockWriteGuard<'a, T>);

impl<T> Mutex<T> {
    /// Creates an unlocked lock.
    pub const fn new(value: T) -> Self {
        Self(parking_lot::Mutex::new(value))
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Waits for exclusive access.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(self.0.lock())
    }

    /// Whether a thread holds the lock.
    pub fn is_locked(&self) -> bool {
        self.0.is_locked()
    }

    /// Returns the value, which no other thread can access.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

impl<T> RwLock<T> {
    /// Creates an unlocked lock.
    pub const fn new(value: T) -> Self {
        Self(parking_lot::RwLock::new(value))
    }

    /// Returns the value.
    pub fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Waits for shared access.
    #[inline]
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read()
    }

    /// Waits for exclusive access.
    #[inline]
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        RwLockWriteGuard(self.0.write())
    }

    /// Waits for exclusive access for at most this time.
    pub fn try_write_for(&self, timeout: Duration) -> Option<RwLockWriteGuard<'_, T>> {
        self.0.try_write_for(timeout).map(RwLockWriteGuard)
    }

    /// Returns the value, which no other thread can access.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        abort_if_panicking();
    }
}

impl<T: ?Sized> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: ?Sized> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: ?Sized> Drop for RwLockWriteGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        abort_if_panicking();
    }
}

/// A lock that was acquired during the unwinding, by a destructor, aborts the process as well.
#[inline]
fn abort_if_panicking() {
    if std::thread::panicking() {
        crate::panics::end_locked();
    }
}
