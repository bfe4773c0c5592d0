//! A copy of small volumes whose other end is in memory.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::EVER;
use crate::digest::{self, Bitmap, CHUNK};
use crate::error::Result;
use crate::feed::{self, Feed, Task, Volume};
use crate::finish::Finish;
use crate::frame::{Header, Kind};
use crate::plan::{Extents, Work};
use crate::pool::lock;
use crate::source::{Identity, Source};
use crate::sync::{Condvar, Mutex, PoisonError};

/// What all threads of the copy share.
pub struct Copy {
    pub volumes: Vec<Volume>,
    pub feed: Feed,
    pub finish: Finish,
    pub line: Line,
}

/// What was read and is to be sent.
pub struct Line {
    state: Mutex<State>,
    news: Condvar,
    /// The book of this test; loom does not see its lock.
    book: std::sync::Mutex<Book>,
}

#[derive(Default)]
struct State {
    parcels: VecDeque<Header>,
    ended: bool,
}

#[derive(Default)]
struct Book {
    /// What is queued or on a connection: index of the volume, and offset.
    out: HashSet<(u16, u64)>,
    handed_out: usize,
}

/// A disk that is full of data.
struct Disk(u64);

struct Everywhere;

impl Copy {
    /// A copy of volumes of so many chunks that is about to start.
    pub fn new(chunks: &[u64]) -> Arc<Copy> {
        let volume = |chunks: &u64| Volume::new("disk".into(), Box::new(Disk(*chunks)), true);
        let volumes = chunks.iter().map(volume);
        Arc::new(Copy {
            volumes: volumes.collect::<Result<_>>().unwrap(),
            feed: Feed::default(),
            finish: Finish::default(),
            line: Line {
                state: Mutex::default(),
                news: Condvar::new(),
                book: std::sync::Mutex::default(),
            },
        })
    }

    /// A reader: puts what the feed hands out on the line.
    pub fn read(&self) {
        while let Some(task) = self.feed.next(&self.volumes).unwrap() {
            let Task { volume, work, .. } = task;
            let Work::Chunk(chunk, ranges) = work else {
                panic!("a full disk has no holes");
            };
            assert_eq!(ranges, [chunk * CHUNK..(chunk + 1) * CHUNK]);
            let ledger = &self.volumes[volume].ledger;
            lock(ledger).offer(chunk, [1; 32], CHUNK as u32).unwrap();
            let sent = feed::header(Kind::Data, volume, chunk..chunk + 1, &self.volumes[volume]);
            self.line.put(sent);
        }
    }

    /// The receiver has it.
    pub fn acknowledge(&self, sent: &Header) {
        self.line.forget(sent);
        self.volumes[usize::from(sent.volume)]
            .acknowledge(sent)
            .unwrap();
        self.line.stir();
    }

    /// The connection that it was sent over broke.
    pub fn lose(&self, sent: &Header) {
        self.line.forget(sent);
        self.feed.put_back(&self.volumes, sent);
    }

    /// The receiver has only some of it.
    pub fn want(&self, sent: &Header) {
        self.line.forget(sent);
        let chunk = sent.offset / CHUNK;
        self.feed.put_wanted(usize::from(sent.volume), chunk, 1);
    }

    /// Whether the receiver has all of it.
    pub fn is_complete(&self) -> bool {
        let complete = |volume: &Volume| lock(&volume.ledger).is_complete();
        self.volumes.iter().all(complete)
    }

    /// Ends the copy.
    pub fn end(&self) {
        lock(&self.line.state).ended = true;
        self.line.news.notify_all();
        self.feed.close();
    }
}

impl Line {
    fn put(&self, sent: Header) {
        self.book(|book| {
            let new = book.out.insert((sent.volume, sent.offset));
            assert!(new, "a chunk is handed out twice at once");
            book.handed_out += 1;
        });
        lock(&self.state).parcels.push_back(sent);
        self.news.notify_all();
    }

    fn forget(&self, sent: &Header) {
        self.book(|book| book.out.remove(&(sent.volume, sent.offset)));
    }

    /// The next parcel; waits until there is one.
    pub fn take(&self) -> Header {
        let parcel = self.wait_for(VecDeque::pop_front);
        parcel.expect("the copy ended, and something is missing")
    }

    /// Waits until something is found, by looking again whenever anything happens;
    /// None when the copy ends first. The sending end looks every few milliseconds.
    pub fn wait_for<T>(
        &self,
        mut found: impl FnMut(&mut VecDeque<Header>) -> Option<T>,
    ) -> Option<T> {
        let mut state = lock(&self.state);
        loop {
            if state.ended {
                return None;
            }
            let found = found(&mut state.parcels);
            if found.is_some() {
                return found;
            }
            state = self
                .news
                .wait_timeout(state, EVER)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lets all who wait look again.
    pub fn stir(&self) {
        drop(lock(&self.state)); // nobody is between looking and waiting
        self.news.notify_all();
    }

    /// The same, from within a look.
    pub fn tell(&self) {
        self.news.notify_all();
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.book(|book| book.out.is_empty())
    }

    /// How often a chunk was handed out, all in all.
    pub fn handed_out(&self) -> usize {
        self.book(|book| book.handed_out)
    }

    fn book<T>(&self, act: impl FnOnce(&mut Book) -> T) -> T {
        act(&mut self.book.lock().unwrap())
    }
}

impl Source for Disk {
    fn identity(&self) -> Identity {
        Identity {
            size: self.0 * CHUNK,
            mtime_ns: 0,
            ctime_ns: 0,
            inode: 0,
        }
    }

    fn extents(&self, _trust_holes: bool) -> Result<Box<dyn Extents + Send>> {
        Ok(Box::new(Everywhere))
    }

    fn read_chunk(&self, _: u64, _: &[Range<u64>], _: &mut [u8]) -> Result<Bitmap> {
        unreachable!("nobody reads")
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }

    fn shown(&self) -> String {
        "a disk".into()
    }
}

impl Extents for Everywhere {
    fn next_data(&mut self, _from: u64) -> std::io::Result<Option<Range<u64>>> {
        Ok(Some(0..digest::MAX_SIZE))
    }
}
