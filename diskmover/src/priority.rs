//! How much a copy's reads and writes count beside others' on the same disk.

use crate::sys;

/// I/O priority of all threads of a copy.
///
/// It is up to the disk's scheduler what it makes of it: bfq and mq-deadline heed
/// it, "none" does not. What goes through the page cache is written by the kernel
/// and not by us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPriority {
    /// As the process has it.
    #[default]
    Normal,
    /// Behind everybody who did not ask for less (best effort, level 7).
    Low,
    /// Only when nobody else wants the disk.
    Idle,
}

impl IoPriority {
    /// The priority of this name.
    pub fn named(name: &str) -> Option<IoPriority> {
        match name {
            "normal" => Some(IoPriority::Normal),
            "low" => Some(IoPriority::Low),
            "idle" => Some(IoPriority::Idle),
            _ => None,
        }
    }

    /// Gives it to this thread, and so to those that it starts. It is a kindness to
    /// others: a kernel that refuses it is no reason to fail.
    pub fn apply(self) {
        let _ = match self {
            IoPriority::Normal => return,
            IoPriority::Low => sys::set_io_priority(sys::IO_BEST_EFFORT, 7),
            IoPriority::Idle => sys::set_io_priority(sys::IO_IDLE, 0),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_inherit_it() {
        let seen = |priority: IoPriority| {
            std::thread::spawn(move || {
                priority.apply();
                std::thread::spawn(sys::io_priority).join().unwrap()
            })
            .join()
            .unwrap()
            .unwrap()
        };
        assert_eq!(seen(IoPriority::Low), (sys::IO_BEST_EFFORT, 7));
        assert_eq!(seen(IoPriority::Idle).0, sys::IO_IDLE);
        assert!(seen(IoPriority::Normal).0 < sys::IO_IDLE);
        assert_eq!(IoPriority::named("urgent"), None);
    }
}
