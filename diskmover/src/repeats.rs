//! How often a chunk is asked for again because it came corrupt.
//!
//! ```text
//! sender                                   receiver
//! DATA                                ->   does not match its authenticator
//!                                     <-   WANT
//! DATA, from the source once more     ->   matches: placed, ACK
//! ```
//! Below TLS nothing can flip a bit unseen, so the memory of one of the two hosts
//! did. A few such chunks are mended; when one does not get through, or many came
//! corrupt, that memory is not to be trusted with a disk. Both ends count, the
//! receiver so that it does not ask for ever, the sender so that it is not made to
//! read and send for ever. Neither keeps more than a number for each such chunk.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::pool::lock;

/// How often one chunk is asked for again.
pub const TRIES: u8 = 3;
/// Most chunks of a copy that may come corrupt.
pub const MOST_CHUNKS: usize = 64;

/// The chunks of a copy that came corrupt, at one of its ends.
#[derive(Default)]
pub struct Repeats {
    times: Mutex<HashMap<(u16, u64), u8>>,
}

impl Repeats {
    /// Counts one more time for the chunk at `offset`; says why when it is one too
    /// many.
    pub fn count(&self, volume: u16, offset: u64) -> Result<(), String> {
        let mut times = lock(&self.times);
        let known = times.len();
        match times.get_mut(&(volume, offset)) {
            Some(count) if *count == TRIES => Err(format!("asked for again {TRIES} times already")),
            Some(count) => {
                *count += 1;
                Ok(())
            }
            None if known == MOST_CHUNKS => {
                Err(format!("{MOST_CHUNKS} other chunks came corrupt before"))
            }
            None => {
                times.insert((volume, offset), 1);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::CHUNK;

    #[test]
    fn a_chunk_is_asked_for_again_three_times() {
        let repeats = Repeats::default();
        for _ in 0..TRIES {
            assert_eq!(repeats.count(0, CHUNK), Ok(()));
        }
        assert!(repeats.count(0, CHUNK).unwrap_err().contains("3 times"));
        assert_eq!(repeats.count(1, CHUNK), Ok(()), "of another volume");
    }

    #[test]
    fn many_corrupt_chunks_are_too_many_and_cost_no_memory() {
        let repeats = Repeats::default();
        for chunk in 0..MOST_CHUNKS as u64 {
            assert_eq!(repeats.count(0, chunk * CHUNK), Ok(()));
        }
        for chunk in 64..5000 {
            assert!(repeats.count(0, chunk * CHUNK).is_err());
        }
        assert_eq!(lock(&repeats.times).len(), MOST_CHUNKS);
        assert_eq!(repeats.count(0, 0), Ok(()), "one that is known");
    }
}
