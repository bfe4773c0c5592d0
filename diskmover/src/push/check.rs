//! What a job has to be before anything of it begins.

use super::Job;
use crate::error::{Code, MoverError, Result};
use crate::session::MAX_VOLUMES;

/// Fails when a job cannot be done.
pub(super) fn job(job: &Job) -> Result<()> {
    let invalid = |text: String| Err(MoverError::new(Code::InvalidArgument, text));
    if job.volumes.is_empty() || job.volumes.len() > MAX_VOLUMES {
        return invalid(format!("a copy has 1 to {MAX_VOLUMES} volumes"));
    }
    if job.connections == 0 || job.connections > job.most_connections || job.most_connections > 64 {
        return invalid(format!(
            "{} to {} is not a number of connections from 1 to 64",
            job.connections, job.most_connections
        ));
    }
    limit(job.limit)?;
    if job.reconnect.is_zero() {
        return invalid("no time to connect in: give some seconds to try for".to_owned());
    }
    if job.session.is_empty() || job.session.len() > 255 || job.tag.len() > 64 {
        return invalid("session id or tag is empty or too long".to_owned());
    }
    for (id, _, _) in &job.volumes {
        if id.is_empty() || id.len() > 255 {
            return invalid(format!("{id:?} is not a volume id of 1 to 255 bytes"));
        }
    }
    Ok(())
}

/// Fails when a limit can be none.
pub(super) fn limit(limit: Option<u64>) -> Result<()> {
    let text = "a limit of 0 bytes a second would never end; give none to lift it";
    match limit {
        Some(0) => Err(MoverError::new(Code::InvalidArgument, text)),
        _ => Ok(()),
    }
}
