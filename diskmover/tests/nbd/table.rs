//! The fault table: what a server does, what must come of it, and why.

use diskmover::error::Code;

use crate::server::{Conn, MIB, Manners, Request, Server, Shake};
use crate::{HASTY, PATIENT, is_clear, read_all, right, spec};

/// What must come of a fault.
pub enum Must {
    /// The copy fails with this code, this reason, and at this place if there is one.
    Fail(Code, &'static str, Option<u64>),
    /// The fault costs time at most.
    Cope,
}

pub struct Fault {
    what: &'static str,
    /// Why that must come of it.
    why: &'static str,
    manners: Manners,
    /// The server goes silent.
    stalls: bool,
    must: Must,
}

pub fn fault(what: &'static str, why: &'static str, manners: Manners, must: Must) -> Fault {
    Fault {
        what,
        why,
        manners,
        stalls: false,
        must,
    }
}

impl Fault {
    pub fn stalling(self) -> Fault {
        Fault {
            stalls: true,
            ..self
        }
    }

    /// What is wrong with how it ended.
    fn verdict(&self) -> Option<String> {
        let server = Server::start(self.manners);
        let patience = if self.stalls { HASTY } else { PATIENT };
        let found = read_all(spec(&server), patience);
        let good = match (&self.must, &found) {
            (Must::Cope, Ok(root)) => *root == right(),
            (Must::Fail(code, reason, place), Err(error)) => {
                error.code == *code && error.message.contains(reason) && is_clear(error, *place)
            }
            _ => false,
        };
        (!good).then(|| format!("{}\n   but {}\n   found {found:?}", self.what, self.why))
    }
}

pub fn all_as_they_must(faults: Vec<Fault>) {
    let before = peak_bytes();
    let wrong: Vec<String> = faults.iter().filter_map(Fault::verdict).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    let grown = peak_bytes() - before;
    assert!(grown < 256 * MIB, "{grown} bytes, because a server said so");
}

/// Most memory that this process ever had.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kib << 10
}

pub fn shake(shake: Shake) -> Manners {
    Manners {
        shake,
        ..Manners::default()
    }
}

pub type Answer = fn(&mut Conn, &Request) -> std::io::Result<()>;

pub fn read(read: Answer) -> Manners {
    Manners {
        read,
        ..Manners::default()
    }
}

pub fn status(status: Answer) -> Manners {
    Manners {
        status,
        ..Manners::default()
    }
}

pub const BROKEN: &str = "it is no NBD server, or one that we do not understand";
pub const LIMITS: &str = "what a server announces must not decide how much memory is taken";
pub const DEADLINE: &str = "a server that does not answer must not hold a copy for ever";
