//! A wire that breaks: it stands between two ends and spoils what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// What happens to a connection.
#[derive(Clone, Copy, Debug)]
pub enum Harm {
    /// It ends, as if the other end had closed it.
    Cut,
    /// It is reset.
    Reset,
    /// Nothing passes any more, and nobody is told.
    Stall,
    /// One bit is another one.
    Flip,
    /// What follows passes in small pieces, slowly.
    Trickle,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the sender to the receiver.
    Up,
    /// From the receiver to the sender.
    Down,
}

/// What is spoilt, and when.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub harm: Harm,
    /// Of what goes this way.
    pub way: Way,
    /// Once the sender has sent so many bytes over the connection.
    pub after: u64,
    /// This many connections, the first ones.
    pub connections: usize,
}

/// A relay to an address; it ends when it is dropped.
pub struct Relay {
    pub address: String,
    pub harmed: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

struct Pass {
    plan: Option<Plan>,
    way: Way,
    /// What the sender has sent.
    up: Arc<AtomicU64>,
    harmed: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Relay {
    pub fn to(target: String, plan: Plan) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Little room for what does not pass.
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 64 << 10).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (harmed, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let relay = Relay {
            address,
            harmed: Arc::clone(&harmed),
            stop: Arc::clone(&stop),
        };
        std::thread::spawn(move || {
            for (number, near) in listener.incoming().enumerate() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(&target)) else {
                    continue;
                };
                let up = Arc::<AtomicU64>::default();
                for way in [Way::Up, Way::Down] {
                    let (near, far) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                    let (from, to) = match way {
                        Way::Up => (near, far),
                        Way::Down => (far, near),
                    };
                    let pass = Pass {
                        plan: (number < plan.connections).then_some(plan),
                        way,
                        up: Arc::clone(&up),
                        harmed: Arc::clone(&harmed),
                        stop: Arc::clone(&stop),
                    };
                    std::thread::spawn(move || pass.run(&from, &to));
                }
            }
        });
        relay
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address); // wakes it
    }
}

impl Pass {
    /// Passes bytes on until either side ends.
    fn run(&self, mut from: &TcpStream, mut to: &TcpStream) {
        let mut buffer = [0; 16 << 10];
        let mut slow = false;
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let before = match self.way {
                Way::Up => self.up.fetch_add(count as u64, Ordering::SeqCst),
                Way::Down => self.up.load(Ordering::SeqCst),
            };
            let mut bytes = &mut buffer[..count];
            if let Some(plan) = self.plan
                && plan.way == self.way
                && !slow
                && let Some(at) = self.place(&plan, before, count)
            {
                match plan.harm {
                    Harm::Flip => bytes[at] ^= 1,
                    Harm::Trickle => slow = true,
                    Harm::Cut | Harm::Reset | Harm::Stall => {
                        bytes = &mut bytes[..at];
                        let _ = to.write_all(bytes);
                        self.harmed.fetch_add(1, Ordering::SeqCst);
                        return self.end(plan.harm, from, to);
                    }
                }
                self.harmed.fetch_add(1, Ordering::SeqCst);
            }
            let sent = match slow {
                false => to.write_all(bytes),
                true => bytes.chunks(1000).try_for_each(|piece| {
                    std::thread::sleep(Duration::from_micros(200));
                    to.write_all(piece)
                }),
            };
            if sent.is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    /// Where in these bytes the harm is done, if it is.
    fn place(&self, plan: &Plan, before: u64, count: usize) -> Option<usize> {
        let is_flip = matches!(plan.harm, Harm::Flip);
        match self.way {
            Way::Up => {
                let at = plan.after.checked_sub(before);
                at.map(|at| at as usize).filter(|at| *at < count)
            }
            // Once is enough: nothing that follows can be read.
            Way::Down if is_flip && before >= plan.after => Some(count / 2),
            Way::Down => (before >= plan.after).then_some(0),
        }
    }

    fn end(&self, harm: Harm, from: &TcpStream, to: &TcpStream) {
        match harm {
            Harm::Stall => {
                while !self.stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            Harm::Reset => {
                for socket in [from, to] {
                    let now = Some(Duration::ZERO);
                    let _ = rustix::net::sockopt::set_socket_linger(socket, now);
                }
            }
            _ => {}
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
