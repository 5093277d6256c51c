//! What is spent and reserved, and what is said about limits.

use chrono::NaiveDate;
use serde_json::Value;
use sqlx::PgConnection;

use super::StoreError;
use super::acting::Standing;
use super::jobs::Lease;
use super::journal::{self, Place, Work};
use crate::domain::budget::{Account, Balance};
use crate::domain::ids::{AgentId, CompanyId, PlaybookId};
use crate::domain::money::Nanos;

/// All that decides about a call, as it stands now; read under the lock of the job that
/// makes it.
#[derive(Debug)]
pub struct Facts {
    /// The database's time, in microseconds since 1970.
    pub now_us: i64,
    /// Whether anything may be done.
    pub standing: Standing,
    /// The company's `config`.
    pub config: Value,
    /// Its policy.
    pub governance: Option<Value>,
    /// The agent's budget, in credits a month.
    pub agent_budget: Option<i64>,
    /// Its `config`.
    pub agent_config: Value,
    /// The most that one of its calls has cost.
    pub dearest: Option<Nanos>,
    /// Whose run it is.
    pub playbook: PlaybookId,
    /// The directive that it serves, where that has a budget, in credits.
    pub directive: Option<(uuid::Uuid, i64)>,
    /// The run is a beat of the agent.
    pub is_beat: bool,
    /// The call, where it was begun before.
    pub before: Option<Before>,
}

/// A call that was begun before.
#[derive(Debug, Clone)]
pub struct Before {
    /// How it stands.
    pub call: journal::Before,
    /// In which day,
    pub day: NaiveDate,
    /// and month.
    pub month: NaiveDate,
    /// For which directive.
    pub directive: Option<uuid::Uuid>,
    /// Who was asked, where they know it by its key.
    pub payer: Option<String>,
    /// By this very attempt, which has not heard that it was, and has not gone on: the model.
    pub unheard: Option<String>,
    /// By another, which has died over it.
    pub is_open: bool,
    /// It was left to a person, who has not let the run go on since.
    pub is_left: bool,
}

/// What decides about a call; nothing when the lease is gone.
pub async fn facts(tx: &mut PgConnection, work: &Work, place: Place) -> Result<Option<Facts>, StoreError> {
    let Lease { job, epoch, session } = work.lease;
    let row = sqlx::query!(
        r#"with held as (
               select from jobs where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' for update
           )
           select (extract(epoch from now()) * 1000000)::bigint as "now_us!", c.status as company_status, c.config,
                  c.governance, a.status as agent_status, a.paused_by is not null as "stopped!", run_killed($4, $6) as "killed!", a.budget, a.config as agent_config, a.dearest_nanos,
                  r.playbook_id, r.root_id, root.metadata -> 'budget' as "root_budget?",
                  j.reserved_nanos as "reserved_nanos?", j.kept_nanos as "kept_nanos?", j.lease_epoch as "epoch?", j.payer as "payer?", j.name as "name?", j.day as "day?", j.month as "month?", j.directive_id as "directive_id?",
                  r.beat_of is not distinct from a.id as "is_beat!",
                  coalesce(j.job_id = $1 and j.lease_epoch = $2 and j.state = 'begun', false) as "unheard!",
                  coalesce((j.job_id, j.lease_epoch) <> ($1, $2) and j.state = 'begun', false) as "is_open!",
                  -- Who lets a run go on gives it another job.
                  coalesce(j.job_id = $1 and j.state = 'failed' and j.response -> 'left_to_person' = 'true', false) as "is_left!"
           from held
           join companies c on c.id = $4
           join agents a on a.company_id = $4 and a.id = $5
           join runs r on r.id = $6 and r.company_id = $4
           left join tasks root on root.company_id = $4 and root.id = r.root_id
           left join journal j on j.company_id = $4 and j.work = $7 and j.turn = $8 and j.call = $9"#,
        job,
        epoch,
        session,
        work.company.0,
        work.agent.0,
        work.run.0,
        work.key,
        i32::try_from(place.turn).unwrap_or(i32::MAX),
        i32::try_from(place.call).unwrap_or(i32::MAX),
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| Facts {
        now_us: row.now_us,
        standing: Standing {
            company_status: row.company_status,
            killed: row.killed,
            agent_status: row.agent_status,
            stopped: row.stopped,
        },
        config: row.config,
        governance: row.governance,
        agent_budget: row.budget,
        agent_config: row.agent_config,
        dearest: row.dearest_nanos.map(Nanos),
        playbook: PlaybookId(row.playbook_id),
        directive: row.root_id.zip(row.root_budget.and_then(|budget| budget.as_i64())),
        is_beat: row.is_beat,
        before: match (row.reserved_nanos, row.kept_nanos, row.epoch, row.day, row.month) {
            (Some(reserved), Some(kept), Some(epoch), Some(day), Some(month)) => Some(Before {
                call: journal::Before { reserved: Nanos(reserved), kept: Nanos(kept), epoch },
                day,
                month,
                directive: row.directive_id,
                payer: row.payer,
                unheard: row.name.filter(|_| row.unheard),
                is_open: row.is_open,
                is_left: row.is_left,
            }),
            _ => None,
        },
    }))
}

/// A change of what an account has spent and reserved.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    /// Which.
    pub account: Account,
    /// So much more is spent,
    pub spent: i64,
    /// and so much more is reserved, or less.
    pub reserved: i64,
}

/// Changes accounts and says how they stand; those that are not there yet begin at nothing.
/// They are locked in the order in which they are given.
pub async fn apply(tx: &mut PgConnection, company: CompanyId, changes: &[Change]) -> Result<Vec<Balance>, StoreError> {
    let rows = sqlx::query!(
        r#"insert into budgets as b (company_id, scope, ref_id, step, period, starts, spent_nanos, reserved_nanos)
           select $1, d.scope, d.ref_id, d.step, d.period, d.starts, d.spent, d.reserved
           from unnest($2::text[], $3::uuid[], $4::integer[], $5::text[], $6::date[], $7::bigint[], $8::bigint[])
               with ordinality as d (scope, ref_id, step, period, starts, spent, reserved, place)
           order by d.place
           on conflict (company_id, scope, ref_id, step, period, starts) do update
           set spent_nanos = b.spent_nanos + excluded.spent_nanos,
               reserved_nanos = b.reserved_nanos + excluded.reserved_nanos
           returning scope, ref_id, step, period, starts, spent_nanos, reserved_nanos, told"#,
        company.0,
        &changes.iter().map(|c| c.account.scope.as_str().to_owned()).collect::<Vec<_>>(),
        &changes.iter().map(|c| c.account.id).collect::<Vec<_>>(),
        &changes.iter().map(|c| c.account.step).collect::<Vec<_>>(),
        &changes.iter().map(|c| c.account.period.as_str().to_owned()).collect::<Vec<_>>(),
        &changes.iter().map(|c| c.account.starts).collect::<Vec<_>>(),
        &changes.iter().map(|c| c.spent).collect::<Vec<_>>(),
        &changes.iter().map(|c| c.reserved).collect::<Vec<_>>(),
    )
    .fetch_all(tx)
    .await?;
    let same = |account: &Account, scope: &str, period: &str| {
        account.scope.as_str() == scope && account.period.as_str() == period
    };
    Ok(rows
        .into_iter()
        .filter_map(|row| {
            let account = changes.iter().map(|change| change.account).find(|account| {
                same(account, &row.scope, &row.period)
                    && (account.id, account.step, account.starts) == (row.ref_id, row.step, row.starts)
            })?;
            let (spent, reserved) = (Nanos(row.spent_nanos), Nanos(row.reserved_nanos));
            Some(Balance { account, spent, reserved, told: row.told })
        })
        .collect())
}

/// Remembers that a threshold of an account was told.
pub async fn told(
    tx: &mut PgConnection,
    company: CompanyId,
    account: &Account,
    percent: i16,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update budgets set told = greatest(told, $7)
         where company_id = $1 and scope = $2 and ref_id = $3 and step = $4 and period = $5 and starts = $6",
        company.0,
        account.scope.as_str(),
        account.id,
        account.step,
        account.period.as_str(),
        account.starts,
        percent,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// What an agent has spent in the month that has begun on a day.
pub async fn spent_in_month(
    executor: impl sqlx::Executor<'_, Database = sqlx::Postgres>,
    company: CompanyId,
    agents: &[uuid::Uuid],
    starts: NaiveDate,
) -> Result<Vec<(AgentId, Nanos)>, StoreError> {
    let rows = sqlx::query!(
        "select ref_id, spent_nanos from budgets
         where company_id = $1 and scope = 'agent' and ref_id = any ($2) and step = -1 and period = 'month' and starts = $3",
        company.0,
        agents,
        starts,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| (AgentId(row.ref_id), Nanos(row.spent_nanos))).collect())
}
