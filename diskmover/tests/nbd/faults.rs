//! The fault table: what a server does, what must come of it, and why.

use diskmover::error::Code;

use crate::server::{
    ALLOCATION, DATA, DONE, EIO, ERROR, ERROR_AT, MIB, Manners, NONE, SIZE, STATUS, Server, Terms,
    ZEROS, failure,
};
use crate::{HASTY, PATIENT, is_clear, read_all, right, spec};

/// What must come of a fault.
enum Must {
    /// The copy fails with this code, this reason, and at this place if there is one.
    Fail(Code, &'static str, Option<u64>),
    /// The fault costs time at most.
    Cope,
}
use Must::{Cope, Fail};

struct Fault {
    what: &'static str,
    /// Why that must come of it.
    why: &'static str,
    manners: Manners,
    /// The server goes silent.
    stalls: bool,
    must: Must,
}

fn fault(what: &'static str, why: &'static str, manners: Manners, must: Must) -> Fault {
    Fault {
        what,
        why,
        manners,
        stalls: false,
        must,
    }
}

impl Fault {
    fn stalling(self) -> Fault {
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
            (Cope, Ok(root)) => *root == right(),
            (Fail(code, reason, place), Err(error)) => {
                error.code == *code && error.message.contains(reason) && is_clear(error, *place)
            }
            _ => false,
        };
        (!good).then(|| format!("{}\n   but {}\n   found {found:?}", self.what, self.why))
    }
}

fn all_as_they_must(faults: Vec<Fault>) {
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

fn shake(shake: fn(&mut crate::server::Conn) -> std::io::Result<bool>) -> Manners {
    Manners {
        shake,
        ..Manners::default()
    }
}

type Answer = fn(&mut crate::server::Conn, &crate::server::Request) -> std::io::Result<()>;

fn read(read: Answer) -> Manners {
    Manners {
        read,
        ..Manners::default()
    }
}

fn status(status: Answer) -> Manners {
    Manners {
        status,
        ..Manners::default()
    }
}

const BROKEN: &str = "it is no NBD server, or one that we do not understand";
const LIMITS: &str = "what a server announces must not decide how much memory is taken";
const DEADLINE: &str = "a server that does not answer must not hold a copy for ever";

#[test]
fn handshakes() {
    use Code::{LimitExceeded, SourceInvalid, SourceIo};
    all_as_they_must(vec![
        fault(
            "it hangs up at once",
            "nobody is there",
            shake(|_| Ok(false)),
            Fail(SourceIo, "closed the connection", None),
        ),
        fault(
            "it says nothing",
            DEADLINE,
            shake(|c| c.stall().map(|()| false)),
            Fail(SourceIo, "in time", None),
        )
        .stalling(),
        fault(
            "it greets a byte at a time",
            DEADLINE,
            shake(|c| {
                for byte in b"NBDMAGICIHAVEOPT\x00\x03" {
                    c.send(&[*byte])?;
                    std::thread::sleep(HASTY.hello / 10);
                }
                c.stall().map(|()| false)
            }),
            Fail(SourceIo, "in time", None),
        )
        .stalling(),
        fault(
            "its first magic is wrong",
            BROKEN,
            shake(|c| c.send(b"HTTP/1.1 400 Bad Request").map(|()| true)),
            Fail(SourceIo, "no NBD greeting", None),
        ),
        fault(
            "it is of the oldstyle",
            "that has no options, so no read-only promise that can be relied on",
            shake(|c| {
                c.send(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53")
                    .and_then(|()| c.send(&[0; 136]))
                    .map(|()| true)
            }),
            Fail(SourceIo, "no NBD greeting", None),
        ),
        fault(
            "it has no fixed newstyle",
            BROKEN,
            shake(|c| c.send(b"NBDMAGICIHAVEOPT\x00\x00").map(|()| true)),
            Fail(SourceInvalid, "before 2011", None),
        ),
        fault(
            "its answer has another magic",
            BROKEN,
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.send(&[0x55; 20]).map(|()| true)
            }),
            Fail(SourceIo, "something else than an answer", None),
        ),
        fault(
            "it answers another option",
            BROKEN,
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.reply(99, 1, &[]).map(|()| true)
            }),
            Fail(SourceIo, "something else than an answer", None),
        ),
        fault(
            "its answer is as long as can be said",
            LIMITS,
            shake(|c| {
                c.greet()?;
                let asked = c.asked()?;
                c.reply_head(asked.option, 1, u32::MAX).map(|()| true)
            }),
            Fail(SourceIo, "an answer of 4294967295 bytes", None),
        ),
        fault(
            "it wants TLS",
            "there is none here: NBD stays on the host",
            shake(|c| {
                c.greet()?;
                let asked = c.asked()?;
                c.reply(asked.option, 1 << 31 | 5, b"use TLS")
                    .map(|()| true)
            }),
            Fail(SourceInvalid, "wants TLS", None),
        ),
        fault(
            "it has no such export",
            "the caller has named another one",
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.reply(8, 1, &[])?;
                c.asked()?;
                c.reply_contexts()?;
                c.asked()?;
                c.reply(7, 1 << 31 | 6, b"gone\x1b[31m").map(|()| true)
            }),
            Fail(SourceInvalid, "no export of that name (gone?[31m)", None),
        ),
        fault(
            "it offers a context that was not asked for",
            "its ids would be mixed up",
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.reply(8, 1, &[])?;
                c.asked()?;
                c.reply(10, 4, b"\x00\x00\x00\x01qemu:other").map(|()| true)
            }),
            Fail(SourceIo, "meta context that was not asked for", None),
        ),
        fault(
            "it gives the same context again and again",
            "one id for each",
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.reply(8, 1, &[])?;
                c.asked()?;
                loop {
                    c.reply(10, 4, b"\x00\x00\x00\x01base:allocation")?;
                }
            }),
            Fail(SourceIo, "meta context that was not asked for", None),
        ),
        fault(
            "it refuses all contexts",
            "then everything is read",
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.reply(8, 1, &[])?;
                c.asked()?;
                c.reply(10, 1 << 31 | 1, &[])?;
                c.asked()?;
                c.reply_info(&Terms::default())?;
                c.reply(7, 1, &[]).map(|()| true)
            }),
            Cope,
        ),
        fault(
            "it gives information without end",
            LIMITS,
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.reply(8, 1, &[])?;
                c.asked()?;
                c.reply_contexts()?;
                c.asked()?;
                loop {
                    c.reply(7, 3, &[0, 9])?;
                }
            }),
            Fail(SourceIo, "information without end", None),
        ),
        fault(
            "it tells no size",
            "the volume has to have one",
            shake(|c| {
                c.greet()?;
                c.asked()?;
                c.reply(8, 1, &[])?;
                c.asked()?;
                c.reply_contexts()?;
                c.asked()?;
                c.reply(7, 1, &[]).map(|()| true)
            }),
            Fail(SourceIo, "no size of the export", None),
        ),
        fault(
            "its block size is no power of two",
            "requests could never be aligned",
            shake(|c| {
                c.shake(&Terms {
                    blocks: Some([3, 4096, 1 << 20]),
                    ..Terms::default()
                })
            }),
            Fail(SourceIo, "block sizes from 3", None),
        ),
        fault(
            "its smallest block is larger than its largest",
            "no request would do",
            shake(|c| {
                c.shake(&Terms {
                    blocks: Some([4096, 4096, 512]),
                    ..Terms::default()
                })
            }),
            Fail(SourceIo, "block sizes from 4096 to 512", None),
        ),
        fault(
            "its smallest block is zero",
            "division by it would panic",
            shake(|c| {
                c.shake(&Terms {
                    blocks: Some([0, 0, 0]),
                    ..Terms::default()
                })
            }),
            Fail(SourceIo, "block sizes from 0", None),
        ),
        fault(
            "its export has 2^63 bytes",
            LIMITS,
            shake(|c| {
                c.shake(&Terms {
                    size: 1 << 63,
                    ..Terms::default()
                })
            }),
            Fail(LimitExceeded, "more than 64 TiB", None),
        ),
        fault(
            "its export can be written",
            "content that can change has no digest",
            shake(|c| {
                c.shake(&Terms {
                    flags: 1,
                    ..Terms::default()
                })
            }),
            Fail(SourceInvalid, "is writable", None),
        ),
        fault(
            "it has no structured replies",
            "simple ones do",
            Manners {
                shake: |c| {
                    c.shake(&Terms {
                        structured: false,
                        ..Terms::default()
                    })
                },
                read: |c, r| {
                    let end = r.offset + u64::from(r.len);
                    c.simple(0, r.cookie, &crate::server::content(r.offset..end))
                },
                ..Manners::default()
            },
            Cope,
        ),
    ]);
}

#[test]
fn reads() {
    use Code::SourceIo;
    const TWICE: &str = "old bytes of a buffer would pass for content";
    let at_start = Some(0);
    all_as_they_must(vec![
        fault(
            "a chunk has another magic",
            BROKEN,
            read(|c, _| c.send(&[0x55; 20])),
            Fail(SourceIo, "something else than a structured reply", at_start),
        ),
        fault(
            "it answers simply though chunks were agreed on",
            BROKEN,
            read(|c, r| c.simple(0, r.cookie, &[0; 4])),
            Fail(SourceIo, "something else than a structured reply", at_start),
        ),
        fault(
            "a chunk is of an unknown kind",
            "what it means for the content is not known",
            read(|c, r| c.chunk(DONE, 77, r.cookie, &[0; 9])),
            Fail(SourceIo, "a chunk of kind 0x4d with 9 bytes", at_start),
        ),
        fault(
            "an empty chunk has a body",
            BROKEN,
            read(|c, r| c.chunk(DONE, NONE, r.cookie, &[0; 9])),
            Fail(SourceIo, "a chunk of kind 0x0 with 9 bytes", at_start),
        ),
        fault(
            "a block status answers a read",
            BROKEN,
            read(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, 2)])),
            Fail(SourceIo, "a chunk of kind 0x5", at_start),
        ),
        fault(
            "the answer is for another cookie",
            TWICE,
            read(|c, r| c.data(DONE, r.cookie + 1000, r.offset..r.offset + 1)),
            Fail(SourceIo, "a reply to no request", at_start),
        ),
        fault(
            "it is done without content",
            TWICE,
            read(|c, r| c.chunk(DONE, NONE, r.cookie, &[])),
            Fail(SourceIo, "not answered in full", at_start),
        ),
        fault(
            "the last byte is missing",
            TWICE,
            read(|c, r| c.data(DONE, r.cookie, r.offset..r.offset + u64::from(r.len) - 1)),
            Fail(SourceIo, "not answered in full", at_start),
        ),
        fault(
            "the middle is missing",
            TWICE,
            read(|c, r| {
                c.data(0, r.cookie, r.offset..r.offset + 512)?;
                c.data(DONE, r.cookie, r.offset + 1024..r.offset + u64::from(r.len))
            }),
            Fail(SourceIo, "not answered in full", at_start),
        ),
        fault(
            "bytes come twice",
            "which of the two is content?",
            read(|c, r| {
                c.data(0, r.cookie, r.offset..r.offset + 1024)?;
                c.data(DONE, r.cookie, r.offset + 512..r.offset + u64::from(r.len))
            }),
            Fail(SourceIo, "the same bytes twice", at_start),
        ),
        fault(
            "a hole covers what came as data",
            "which of the two is content?",
            read(|c, r| {
                c.data(0, r.cookie, r.offset..r.offset + 1024)?;
                let hole = [&r.offset.to_be_bytes()[..], &r.len.to_be_bytes()].concat();
                c.chunk(DONE, ZEROS, r.cookie, &hole)
            }),
            Fail(SourceIo, "the same bytes twice", at_start),
        ),
        fault(
            "a chunk begins before its request",
            "it would be written outside its buffer",
            read(|c, r| match r.offset {
                0 => c.answer_read(r),
                at => c.data(DONE, r.cookie, at - 1..at),
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk ends after its request",
            "it would be written outside its buffer",
            read(|c, r| c.data(DONE, r.cookie, r.offset..r.offset + u64::from(r.len) + 1)),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk is as long as can be said",
            LIMITS,
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, u32::MAX)?;
                c.send(&r.offset.to_be_bytes())
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk lies at the end of all numbers",
            "sums of it overflow",
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + 512)?;
                c.send(&(u64::MAX - 5).to_be_bytes())
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a hole is longer than its request",
            "it would be written outside its buffer",
            read(|c, r| {
                let hole = [&r.offset.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
                c.chunk(DONE, ZEROS, r.cookie, &hole)
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a hole has no length",
            BROKEN,
            read(|c, r| {
                let hole = [&r.offset.to_be_bytes()[..], &[0; 4]].concat();
                c.chunk(0, ZEROS, r.cookie, &hole)
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk of data has none",
            "it could come without end",
            read(|c, r| c.chunk(0, DATA, r.cookie, &r.offset.to_be_bytes())),
            Fail(SourceIo, "a chunk of kind 0x1 with 8 bytes", at_start),
        ),
        fault(
            "every other byte comes alone",
            LIMITS,
            read(|c, r| {
                for at in (r.offset..r.offset + u64::from(r.len)).step_by(2) {
                    c.data(0, r.cookie, at..at + 1)?;
                }
                Ok(())
            }),
            Fail(SourceIo, "an answer in crumbs", at_start),
        ),
        fault(
            "pieces come backwards",
            "any order is allowed",
            read(|c, r| {
                let half = r.offset + u64::from(r.len) / 2;
                c.data(0, r.cookie, half..r.offset + u64::from(r.len))?;
                c.data(0, r.cookie, r.offset..half)?;
                c.chunk(DONE, NONE, r.cookie, &[])
            }),
            Cope,
        ),
        fault(
            "there is more after the end of an answer",
            "the next answer would be taken for another",
            read(|c, r| {
                c.answer_read(r)?;
                c.data(DONE, r.cookie, r.offset..r.offset + 1)
            }),
            Fail(SourceIo, "a reply to no request", at_start),
        ),
        fault(
            "it reports an error",
            "nothing of it may be taken for content",
            read(|c, r| match r.offset {
                0 => c.fail(ERROR, r.cookie, EIO, b"bad sector"),
                _ => c.answer_read(r),
            }),
            Fail(
                SourceIo,
                "Input/output error (os error 5) (bad sector)",
                at_start,
            ),
        ),
        fault(
            "it reports an error and where",
            "the operator looks there",
            read(|c, r| {
                let body = [
                    &failure(EIO, b"bad sector")[..],
                    &(r.offset + 1024).to_be_bytes(),
                ]
                .concat();
                c.data(0, r.cookie, r.offset..r.offset + 1024)?;
                c.chunk(DONE, ERROR_AT, r.cookie, &body)
            }),
            Fail(SourceIo, "bad sector", Some(1024)),
        ),
        fault(
            "it reports an error of a kind that is not known",
            "an error is an error",
            read(|c, r| c.fail(1 << 15 | 99, r.cookie, EIO, b"so")),
            Fail(SourceIo, "Input/output error", at_start),
        ),
        fault(
            "it reports that nothing went wrong",
            BROKEN,
            read(|c, r| c.fail(ERROR, r.cookie, 0, b"")),
            Fail(SourceIo, "an error without an error", at_start),
        ),
        fault(
            "its error is as long as can be said",
            LIMITS,
            read(|c, r| c.chunk_head(DONE, ERROR, r.cookie, u32::MAX)),
            Fail(
                SourceIo,
                "a chunk of kind 0x8001 with 4294967295 bytes",
                at_start,
            ),
        ),
        fault(
            "its error says more than it has",
            "it would read on in the next reply",
            read(|c, r| c.chunk(DONE, ERROR, r.cookie, &[0, 0, 0, 5, 0xFF, 0xFF, b'x'])),
            Fail(SourceIo, "a chunk of kind 0x8001 with 7 bytes", at_start),
        ),
        fault(
            "its error plays with the terminal",
            "messages are shown to people",
            read(|c, r| c.fail(ERROR, r.cookie, EIO, b"\x1b]0;owned\x07")),
            Fail(SourceIo, "(?]0;owned?)", at_start),
        ),
        fault(
            "it does not answer",
            DEADLINE,
            read(|c, _| c.stall()),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it answers half and no more",
            DEADLINE,
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + r.len)?;
                c.send(&r.offset.to_be_bytes())?;
                c.send(&[1; 512])?;
                c.stall()
            }),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it answers a byte at a time",
            DEADLINE,
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + r.len)?;
                c.send(&r.offset.to_be_bytes())?;
                loop {
                    c.send(&[1])?;
                    std::thread::sleep(HASTY.reply / 20);
                }
            }),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it hangs up in the middle of an answer",
            "half an answer is none",
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + r.len)?;
                c.send(&r.offset.to_be_bytes())?;
                c.hang_up()
            }),
            Fail(SourceIo, "closed the connection", at_start),
        ),
        fault(
            "the export shrinks meanwhile",
            "what is beyond its end is not zero, it is gone",
            read(|c, r| match r.offset {
                at if at >= 2 * MIB => c.fail(ERROR, r.cookie, 22, b"beyond the end"),
                _ => c.answer_read(r),
            }),
            Fail(SourceIo, "beyond the end", Some(2 * MIB)),
        ),
    ]);
}

#[test]
fn simple_reads() {
    use Code::SourceIo;
    fn simple(read: Answer) -> Manners {
        Manners {
            shake: |c| {
                c.shake(&Terms {
                    structured: false,
                    ..Terms::default()
                })
            },
            read,
            ..Manners::default()
        }
    }
    all_as_they_must(vec![
        fault(
            "the answer is for another cookie",
            BROKEN,
            simple(|c, r| c.simple(0, r.cookie + 1000, &[])),
            Fail(SourceIo, "a reply to no request", Some(0)),
        ),
        fault(
            "it reports an error",
            "nothing of it may be taken for content",
            simple(|c, r| match r.offset {
                0 => c.simple(EIO, r.cookie, &[]),
                _ => c.stall(),
            }),
            Fail(SourceIo, "Input/output error", Some(0)),
        ),
        fault(
            "it answers in chunks that were not agreed on",
            BROKEN,
            simple(|c, r| c.answer_read(r)),
            Fail(SourceIo, "something else than a reply", Some(0)),
        ),
        fault(
            "it answers half and no more",
            DEADLINE,
            simple(|c, r| {
                c.simple(0, r.cookie, &[1; 512])?;
                c.stall()
            }),
            Fail(SourceIo, "in time", Some(0)),
        )
        .stalling(),
    ]);
}

#[test]
fn block_status() {
    use Code::SourceIo;
    const READ: &str = "what a server does not know has to be read";
    let at_start = Some(0);
    all_as_they_must(vec![
        fault(
            "it reports an error",
            READ,
            status(|c, r| c.fail(ERROR, r.cookie, 95, b"not here")),
            Cope,
        ),
        fault(
            "it says nothing of it",
            READ,
            status(|c, r| c.chunk(DONE, NONE, r.cookie, &[])),
            Cope,
        ),
        fault(
            "it says something, and then an error",
            READ,
            status(|c, r| {
                c.extents(0, r.cookie, ALLOCATION, &[(r.len, 2)])?;
                c.fail(ERROR, r.cookie, EIO, b"not so")
            }),
            Cope,
        ),
        fault(
            "an extent has no length",
            "there would be no progress",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(0, 2), (r.len, 2)])),
            Cope,
        ),
        fault(
            "an extent has no length, after one that has",
            "what follows is not believed",
            status(|c, r| match r.offset {
                0 => c.extents(
                    DONE,
                    r.cookie,
                    ALLOCATION,
                    &[(512, 0), (0, 2), (r.len - 512, 2)],
                ),
                _ => c.answer_status(r),
            }),
            Cope,
        ),
        fault(
            "extents reach beyond the end",
            "what lies there is nobody's",
            status(|c, r| match r.offset {
                0 => c.extents(DONE, r.cookie, ALLOCATION, &[(u32::MAX, 0), (u32::MAX, 2)]),
                _ => c.answer_status(r),
            }),
            Cope,
        ),
        fault(
            "it tells of 512 bytes at a time",
            "less is known, no more",
            status(|c, r| {
                let hole = crate::server::HOLE.contains(&r.offset);
                c.extents(
                    DONE,
                    r.cookie,
                    ALLOCATION,
                    &[(512, if hole { 3 } else { 0 })],
                )
            }),
            Cope,
        ),
        fault(
            "it sets flags that nobody knows",
            "only ZERO lets us skip",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, !2)])),
            Cope,
        ),
        fault(
            "it calls data a hole, and not zero",
            "a hole may read as anything",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, 1)])),
            Cope,
        ),
        fault(
            "it lists nothing",
            BROKEN,
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[])),
            Fail(SourceIo, "a block status of 4 bytes", at_start),
        ),
        fault(
            "half an extent is missing",
            BROKEN,
            status(|c, r| c.chunk(DONE, STATUS, r.cookie, &[0; 17])),
            Fail(SourceIo, "a block status of 17 bytes", at_start),
        ),
        fault(
            "its list is as long as can be said",
            LIMITS,
            status(|c, r| c.chunk_head(DONE, STATUS, r.cookie, u32::MAX - 3)),
            Fail(SourceIo, "a block status of 4294967292 bytes", at_start),
        ),
        fault(
            "it is about another context",
            "its flags mean something else",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION + 1, &[(r.len, 2)])),
            Fail(SourceIo, "not asked for", at_start),
        ),
        fault(
            "it is told twice",
            "the second would follow where the first ends",
            status(|c, r| {
                c.extents(0, r.cookie, ALLOCATION, &[(r.len, 0)])?;
                c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, 2)])
            }),
            Fail(SourceIo, "not asked for", at_start),
        ),
        fault(
            "it is for another cookie",
            BROKEN,
            status(|c, r| c.extents(DONE, r.cookie + 9, ALLOCATION, &[(r.len, 2)])),
            Fail(SourceIo, "a reply to no request", at_start),
        ),
        fault(
            "content comes instead",
            BROKEN,
            status(|c, r| c.data(DONE, r.cookie, 0..512)),
            Fail(SourceIo, "a chunk of kind 0x1", at_start),
        ),
        fault(
            "it does not answer",
            DEADLINE,
            status(|c, _| c.stall()),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it hangs up",
            "nobody is there",
            status(|c, _| c.hang_up()),
            Fail(SourceIo, "closed the connection", at_start),
        ),
    ]);
}
