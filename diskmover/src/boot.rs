//! Which start of this machine a file was looked at in, as a receiver is told.
//!
//! What a file holds can be durable without the time of that write: fdatasync leaves
//! the time out, lazytime keeps it in memory for long. After a crash the file then has
//! the time from before, and looks as it did when it was last copied. While the machine
//! runs times are right; so what was placed in another start of it is compared, and
//! never gone on from.
//!
//! The kernel has one such name for all containers, and a machine that was suspended or
//! has its daemons started again keeps it.

use std::fs;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A number of this start of the machine; where the kernel does not tell, one of this
/// attempt, which has the `nonce`. The highest bit is never set.
pub fn mark(nonce: &[u8; 16]) -> u64 {
    of(fs::read_to_string(BOOT_ID).ok().as_deref(), nonce)
}

fn of(boot_id: Option<&str>, nonce: &[u8; 16]) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("diskmover 1 start of the machine");
    match boot_id.map(str::trim) {
        None | Some("") => hasher.update(b"attempt").update(nonce),
        Some(id) => hasher.update(b"boot").update(id.as_bytes()),
    };
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word) >> 1
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::feed::Volume;
    use crate::source::FileSource;

    #[test]
    fn a_start_of_the_machine_has_one_number_and_every_other_start_another() {
        let one = of(Some("one\n"), &[1; 16]);
        assert_eq!(one, of(Some("one\n"), &[2; 16]));
        assert_ne!(one, of(Some("two\n"), &[1; 16]));
        assert_eq!(mark(&[1; 16]), mark(&[2; 16]), "this machine does not tell");
    }

    #[test]
    fn where_the_kernel_does_not_tell_every_attempt_is_a_start() {
        for silent in [None, Some("\n")] {
            assert_eq!(of(silent, &[1; 16]), of(silent, &[1; 16]));
            assert_ne!(of(silent, &[1; 16]), of(silent, &[2; 16]));
        }
    }

    #[test]
    fn a_file_is_another_source_after_a_start_and_keeps_its_size() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"content").unwrap();
        let source = Box::new(FileSource::open(file.path()).unwrap());
        let volume = Volume::new("disk".into(), source, true).unwrap();
        assert_eq!(volume.identity(5), volume.identity(5));
        assert_ne!(volume.identity(5), volume.identity(6));
        assert_eq!(volume.identity(5).size, 7);
    }
}
