//! What decides about a call of a tool.

use serde_json::Value;
use sqlx::PgConnection;

use super::StoreError;
use super::jobs::Lease;
use super::journal::Work;

/// All that decides about a call, as it stands now.
#[derive(Debug)]
pub struct Facts {
    /// Whether anything may be done.
    pub standing: Standing,
    /// The company's `config`.
    pub config: Value,
    /// Its policy.
    pub governance: Option<Value>,
    /// What a person has said about the call.
    pub said: Option<Said>,
}

/// How those stand without whom nothing is done.
#[derive(Debug)]
pub struct Standing {
    /// The company's status.
    pub company_status: String,
    /// The run's playbook was stopped at once, or one that it does a step for.
    pub killed: bool,
    /// The agent's own status.
    pub agent_status: String,
    /// The agent was stopped at once, and not only paused.
    pub stopped: bool,
}

/// What a person has said about a call.
#[derive(Debug)]
pub struct Said {
    /// `pending`, `approved`, `rejected`, `expired` or `cancelled`.
    pub status: String,
    /// In words.
    pub note: Option<String>,
    /// SHA-256 of what was shown.
    pub digest: Vec<u8>,
    /// The arguments that were wanted instead.
    pub edited: Option<Value>,
}

/// What decides about a call, under the lock of the job that makes it; nothing when the lease
/// is gone.
pub async fn facts(tx: &mut PgConnection, work: &Work, key: &str) -> Result<Option<Facts>, StoreError> {
    let Lease { job, epoch, session } = work.lease;
    let row = sqlx::query!(
        r#"with held as (
               select from jobs where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' for update
           )
           select c.status as company_status, c.config, c.governance, a.status as agent_status,
                  a.paused_by is not null as "stopped!", run_killed($4, $6) as "killed!",
                  s.status as "said_status?", s.note as "said_note?", s.digest as "said_digest?", s.edited as "said_edited?"
           from held
           join companies c on c.id = $4
           join agents a on a.company_id = $4 and a.id = $5
           left join lateral (
               select * from approvals p where p.run_id = $6 and p.call_key = $7 order by p.id desc limit 1
           ) s on true"#,
        job,
        epoch,
        session,
        work.company.0,
        work.agent.0,
        work.run.0,
        key,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| Facts {
        standing: Standing {
            company_status: row.company_status,
            killed: row.killed,
            agent_status: row.agent_status,
            stopped: row.stopped,
        },
        config: row.config,
        governance: row.governance,
        said: match (row.said_status, row.said_digest) {
            (Some(status), Some(digest)) => Some(Said { status, note: row.said_note, digest, edited: row.said_edited }),
            _ => None,
        },
    }))
}
