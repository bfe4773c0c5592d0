//! Connections to one export: several when the server allows it.
//!
//! ```text
//!        made when there is room          lent
//! place ------------------------> free <--------> at work
//!   ^                                                |
//!   +-------- closed at the server, first of all ----+ it failed
//! ```
//! A place is given up by whoever cannot connect, too, and each time that a
//! connection or a place becomes free somebody who waits is woken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::nbd::address::ExportSpec;
use crate::nbd::client::{Client, Patience};
use crate::nbd::error::{NbdError, Result};
use crate::nbd::handshake::Export;
use crate::nbd::socket::{Breaker, Socket};
use crate::pool::lock;
use crate::sync::{Condvar, Mutex, PoisonError};

/// Connections to an export whose server allows several.
const CONNECTIONS: usize = 4;
const TICK: Duration = Duration::from_millis(100);

struct Connection {
    client: Client<Socket>,
    number: u64,
}

struct State {
    free: Vec<Connection>,
    /// Connections that stand or are being made.
    count: usize,
    /// Most that there may be.
    most: usize,
    /// Of each connection that stands. They hold its socket too.
    breakers: BTreeMap<u64, Breaker>,
    /// Connections that ever stood.
    made: u64,
    aborted: bool,
}

/// The connections of one copy; made when first needed.
pub struct Pool {
    spec: ExportSpec,
    contexts: Vec<String>,
    patience: Patience,
    export: Export,
    state: Mutex<State>,
    returned: Condvar,
}

impl Pool {
    /// Connects once, to see what is there.
    pub fn open(spec: ExportSpec, contexts: Vec<String>, patience: Patience) -> Result<Arc<Pool>> {
        let (client, breaker) = connect(&spec, &contexts, patience)?;
        let export = client.export().clone();
        let most = if export.multi_conn { CONNECTIONS } else { 1 };
        Ok(Arc::new(Pool {
            spec,
            contexts,
            patience,
            export,
            state: Mutex::new(State {
                free: vec![Connection { client, number: 0 }],
                count: 1,
                most,
                breakers: BTreeMap::from([(0, breaker)]),
                made: 1,
                aborted: false,
            }),
            returned: Condvar::new(),
        }))
    }

    /// What the server said about the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// How long the server may take.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Lends a connection; one that fails is not used again.
    ///
    /// What the server reports of a request leaves the connection usable only
    /// when nothing else was under way: `reusable` says whether.
    pub fn with<T>(
        &self,
        reusable: fn(&NbdError) -> bool,
        work: impl FnOnce(&mut Client<Socket>) -> Result<T>,
    ) -> Result<T> {
        let mut connection = self.take()?;
        let result = work(&mut connection.client);
        if result.as_ref().err().is_none_or(reusable) {
            lock(&self.state).free.push(connection);
        } else {
            // A server that takes no more than these has to see it go first.
            lock(&self.state).breakers.remove(&connection.number);
            drop(connection);
            lock(&self.state).count -= 1;
        }
        self.returned.notify_one();
        result
    }

    /// Makes every request fail, those under way too.
    pub fn abort(&self) {
        let mut state = lock(&self.state);
        state.aborted = true;
        state.breakers.values().for_each(Breaker::shut);
        self.returned.notify_all();
    }

    fn take(&self) -> Result<Connection> {
        let mut state = lock(&self.state);
        loop {
            if state.aborted {
                return Err(NbdError::Closed);
            }
            if let Some(connection) = state.free.pop() {
                return Ok(connection);
            }
            if state.count < state.most {
                state.count += 1;
                drop(state);
                match self.another() {
                    Ok(connection) => return Ok(connection),
                    Err(error) => {
                        state = lock(&self.state);
                        state.count -= 1;
                        if state.count == 0 {
                            // Nobody will give one back: who waits has to try too.
                            self.returned.notify_one();
                            return Err(error);
                        }
                        // It promised more than it keeps: do with what stands.
                        state.most = state.count;
                        continue;
                    }
                }
            }
            state = self
                .returned
                .wait_timeout(state, TICK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn another(&self) -> Result<Connection> {
        let (client, breaker) = connect(&self.spec, &self.contexts, self.patience)?;
        if !client.export().is_same(&self.export) {
            return Err(NbdError::protocol("another export on a second connection"));
        }
        let mut state = lock(&self.state);
        if state.aborted {
            breaker.shut();
        }
        let number = state.made;
        state.made += 1;
        state.breakers.insert(number, breaker);
        Ok(Connection { client, number })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let clients = state.free.iter_mut().map(|one| &mut one.client);
        clients.for_each(Client::disconnect);
    }
}

fn connect(
    spec: &ExportSpec,
    contexts: &[String],
    patience: Patience,
) -> Result<(Client<Socket>, Breaker)> {
    let refused = |e: std::io::Error| NbdError::Refused(format!("cannot connect: {e}"));
    let socket = Socket::connect(&spec.address, patience.hello).map_err(refused)?;
    let breaker = socket.breaker()?;
    let client = Client::new(socket, &spec.name, contexts, patience)?;
    Ok((client, breaker))
}
