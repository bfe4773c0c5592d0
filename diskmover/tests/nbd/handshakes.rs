//! Faults before the first request.

use diskmover::error::Code;

use crate::HASTY;
use crate::server::*;
use crate::table::Must::{Cope, Fail};
use crate::table::*;

#[test]
fn handshakes() {
    use Code::{SourceInvalid, SourceIo};
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
            Fail(SourceInvalid, "more than 64 TiB", None),
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
                    c.simple(0, r.cookie, &content(r.offset..end))
                },
                ..Manners::default()
            },
            Cope,
        ),
    ]);
}
