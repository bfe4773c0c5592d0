//! Many sessions with many volumes at once, each of which is allowed.

use diskmover::error::{Code, Side};
use diskmover::frame::Kind;
use diskmover::listener::Limits;

use crate::peer::{Heard, Peer};
use crate::rig::{Rig, limits};
use crate::within;

/// As large as file systems allow.
const SIZE: u64 = 8 << 40;
const SESSIONS: usize = 6;
const VOLUMES: usize = 10;

#[test]
fn the_volumes_of_all_sessions_together_cost_what_they_may() {
    within(150, || {
        let rig = Rig::with(Limits {
            volume_memory: 160 << 20,
            ..limits()
        });
        let names: Vec<String> = (0..VOLUMES).map(|n| format!("disk{n}")).collect();
        let mut peers = Vec::new();
        let mut refused = 0;
        for session in 0..SESSIONS {
            let id = format!("session{session}");
            let own: Vec<String> = names.iter().map(|n| format!("{n}-{session}")).collect();
            let volumes: Vec<_> = own.iter().map(|name| (name.as_str(), SIZE)).collect();
            rig.open_as(&id, "t1", &volumes).unwrap();
            let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
            peer.session = id;
            peer.hello(|_| {});
            peer.hear_kind(Kind::Welcome);
            let mut is_open = |(index, name): (usize, &String)| {
                peer.open(index as u16, name, SIZE);
                loop {
                    match peer.hear() {
                        Heard::Frame(header, _) if header.kind == Kind::Opened => return true,
                        Heard::Frame(header, payload) if header.kind == Kind::Error => {
                            let error = diskmover::messages::decode_error(&payload).unwrap();
                            assert_eq!(error.code, Code::LimitExceeded, "{error}");
                            assert_eq!((error.side, error.retryable), (Side::Receiver, true));
                            assert!(error.message.contains("memory for volumes"), "{error}");
                            return false;
                        }
                        Heard::Frame(..) => {}
                        Heard::End => panic!("an end without a reason"),
                    }
                }
            };
            if !own.iter().enumerate().all(&mut is_open) {
                refused += 1;
            }
            peers.push(peer);
        }
        assert!(refused > 0 && refused < SESSIONS, "{refused} were refused");
    });
}
