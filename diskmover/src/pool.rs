//! The one pool of chunk buffers of a session: the only flow control there is.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use crate::digest::CHUNK;
use crate::error::{MoverError, Result};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::sys::AlignedBuf;

/// Buffers that are made at once: one huge page of most machines.
const TOGETHER: usize = 2;

/// Locks a mutex whatever happened to its last holder.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Shelf {
    free: Vec<AlignedBuf>,
    unmade: usize,
}

/// A fixed number of chunk buffers, made when first needed.
pub struct Pool {
    chunks: usize,
    shelf: Mutex<Shelf>,
    returned: Condvar,
}

/// A buffer of one chunk; returns to its pool when dropped.
pub struct Buffer {
    memory: Option<AlignedBuf>,
    pool: Arc<Pool>,
}

impl Pool {
    /// A pool of `bytes`, at least 4 chunks.
    pub fn new(bytes: u64) -> Arc<Pool> {
        let count = (bytes / CHUNK).max(4) as usize;
        Arc::new(Pool {
            chunks: count,
            shelf: Mutex::new(Shelf {
                free: Vec::new(),
                unmade: count,
            }),
            returned: Condvar::new(),
        })
    }

    /// How many buffers there can be.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// A buffer, waiting for one at most `timeout`; None when none came back.
    ///
    /// Fails when the system gives no memory and there is no buffer to wait for.
    /// While some are out, a pool that cannot grow is only a smaller one.
    pub fn take(self: &Arc<Self>, timeout: Duration) -> Result<Option<Buffer>> {
        let none_yet = |shelf: &mut Shelf| {
            shelf.stock();
            shelf.free.is_empty() && shelf.out(self.chunks) > 0
        };
        let (mut shelf, _) = self
            .returned
            .wait_timeout_while(lock(&self.shelf), timeout, none_yet)
            .unwrap_or_else(PoisonError::into_inner);
        match shelf.free.pop() {
            Some(memory) => Ok(Some(Buffer {
                memory: Some(memory),
                pool: Arc::clone(self),
            })),
            None if shelf.out(self.chunks) > 0 => Ok(None),
            None => Err(MoverError::no_memory(TOGETHER * CHUNK as usize)),
        }
    }
}

impl Shelf {
    /// Makes buffers, if there are none and there may be more.
    fn stock(&mut self) {
        if self.free.is_empty() && self.unmade > 0 {
            let made = AlignedBuf::several(self.unmade.min(TOGETHER), CHUNK as usize);
            let made = made.unwrap_or_default();
            self.unmade -= made.len();
            self.free.extend(made);
        }
    }

    /// How many buffers of `chunks` are in use.
    fn out(&self, chunks: usize) -> usize {
        chunks - self.unmade - self.free.len()
    }
}

impl Pool {
    /// Gives the memory of the free buffers back.
    pub fn trim(&self) {
        let mut shelf = lock(&self.shelf);
        shelf.unmade += shelf.free.len();
        shelf.free = Vec::new();
    }
}

impl Buffer {
    /// Exchanges the memory with a chunk-sized one of the caller.
    pub fn swap(&mut self, other: &mut AlignedBuf) {
        if let Some(memory) = &mut self.memory {
            std::mem::swap(memory, other);
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_deref().unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        lock(&self.pool.shelf).free.extend(self.memory.take());
        self.pool.returned.notify_one();
    }
}
