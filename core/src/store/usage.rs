//! What was spent and how often playbooks ran: from roll-ups and the deltas
//! that are not folded into them yet.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::agents::AgentRow;
use super::budgets;
use super::playbooks::PlaybookRow;
use crate::domain::budget::days;
use crate::domain::ids::{AccountId, AgentId, CompanyId};
use crate::domain::money::Nanos;

/// What some agents of a company have spent in all.
pub async fn add_agent_totals(
    tx: &mut PgConnection,
    company: CompanyId,
    agents: &mut [AgentRow],
) -> Result<(), StoreError> {
    let ids: Vec<_> = agents.iter().map(|agent| agent.agent.0).collect();
    let rows = sqlx::query!(
        r#"select k.id as "id!",
               ((select coalesce(sum(t.nanos), 0) from cost_totals t where t.company_id = $1 and t.agent_id = k.id)
                + (select coalesce(sum(d.nanos), 0) from cost_deltas d where d.company_id = $1 and d.agent_id = k.id)
               )::bigint as "nanos!"
           from unnest($2::uuid[]) as k (id)"#,
        company.0,
        &ids,
    )
    .fetch_all(&mut *tx)
    .await?;
    for row in rows {
        for agent in agents.iter_mut().filter(|agent| agent.agent.0 == row.id) {
            agent.cost = Nanos(row.nanos);
        }
    }
    let now = sqlx::query!(
        r#"select (extract(epoch from now()) * 1000000)::bigint as "now_us!", config ->> 'timezone' as zone
           from companies where id = $1"#,
        company.0,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(now) = now else { return Ok(()) };
    let (_, month) = days(now.now_us, now.zone.as_deref());
    for (id, used) in budgets::spent_in_month(&mut *tx, company, &ids, month).await? {
        for agent in agents.iter_mut().filter(|agent| agent.agent == id) {
            agent.used = used;
        }
    }
    Ok(())
}

/// How often some playbooks ran, what that cost and how long it took.
pub async fn add_run_totals(tx: &mut PgConnection, playbooks: &mut [PlaybookRow]) -> Result<(), StoreError> {
    let companies: Vec<_> = playbooks.iter().map(|row| row.company.0).collect();
    let ids: Vec<_> = playbooks.iter().map(|row| row.playbook.0).collect();
    let rows = sqlx::query!(
        r#"select k.id as "id!", coalesce(sum(s.started), 0)::bigint as "started!", coalesce(sum(s.ended), 0)::bigint as "ended!",
               coalesce(sum(s.cost_nanos), 0)::bigint as "cost!", coalesce(sum(s.duration_ms), 0)::bigint as "duration!",
               max(s.last_run_at) as last_run_at
           from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
           left join lateral (
               select t.started, t.ended, t.cost_nanos, t.duration_ms, t.last_run_at from run_totals t
               where t.company_id = k.company_id and t.playbook_id = k.id
               union all
               select d.started, d.ended, d.cost_nanos, d.duration_ms, d.last_run_at from run_deltas d
               where d.company_id = k.company_id and d.playbook_id = k.id
           ) s on true
           group by k.id"#,
        &companies,
        &ids,
    )
    .fetch_all(tx)
    .await?;
    for row in rows {
        for playbook in playbooks.iter_mut().filter(|playbook| playbook.playbook.0 == row.id) {
            let ended = row.ended.max(1);
            playbook.run_count = row.started;
            playbook.last_run_at = row.last_run_at;
            playbook.avg_run_cost = Nanos(row.cost / ended);
            playbook.avg_run_duration_s = row.duration / ended / 1_000;
        }
    }
    Ok(())
}

/// How many deltas one statement folds.
pub const FOLD_MAX: i64 = 5_000;

/// Folds what runs have added into the sums; says how much.
pub async fn fold_runs(pool: &PgPool) -> Result<u64, StoreError> {
    let folded = sqlx::query_scalar!(
        r#"with taken as (
             delete from run_deltas where id = any (array(
                 select id from run_deltas order by id limit $1 for update skip locked))
             returning company_id, playbook_id, started, ended, cost_nanos, duration_ms, last_run_at
         ),
         folded as (
             insert into run_totals as t (company_id, playbook_id, started, ended, cost_nanos, duration_ms, last_run_at)
             select company_id, playbook_id, sum(started), sum(ended), sum(cost_nanos), sum(duration_ms), max(last_run_at)
             from taken
             group by company_id, playbook_id
             order by company_id, playbook_id
             on conflict (company_id, playbook_id) do update
             set started = t.started + excluded.started,
                 ended = t.ended + excluded.ended,
                 cost_nanos = t.cost_nanos + excluded.cost_nanos,
                 duration_ms = t.duration_ms + excluded.duration_ms,
                 last_run_at = greatest(t.last_run_at, excluded.last_run_at)
         )
         select count(*) as "count!" from taken"#,
        FOLD_MAX,
    )
    .fetch_one(pool)
    .await?;
    Ok(u64::try_from(folded).unwrap_or(0))
}

/// Folds what was spent into the sums; says how much.
pub async fn fold_costs(pool: &PgPool) -> Result<u64, StoreError> {
    let folded = sqlx::query_scalar!(
        r#"with taken as (
             delete from cost_deltas where id = any (array(
                 select id from cost_deltas order by id limit $1 for update skip locked))
             returning company_id, at, agent_id, category, nanos
         ),
         quarters as (
             insert into cost_rollups as r (company_id, quarter, agent_id, category, nanos)
             select company_id, date_bin('15 minutes', at, 'epoch'), agent_id, category, sum(nanos)
             from taken
             group by 1, 2, 3, 4
             order by 1, 2, 3, 4
             on conflict (company_id, quarter, agent_id, category) do update set nanos = r.nanos + excluded.nanos
         ),
         totals as (
             insert into cost_totals as t (company_id, agent_id, category, nanos)
             select company_id, agent_id, category, sum(nanos)
             from taken
             group by 1, 2, 3
             order by 1, 2, 3
             on conflict (company_id, agent_id, category) do update set nanos = t.nanos + excluded.nanos
         )
         select count(*) as "count!" from taken"#,
        FOLD_MAX,
    )
    .fetch_one(pool)
    .await?;
    Ok(u64::try_from(folded).unwrap_or(0))
}

/// What was spent on one thing.
#[derive(Debug, Clone)]
pub struct Spent {
    /// Whose.
    pub company: CompanyId,
    /// By whom; nobody for tools that a playbook uses directly.
    pub agent: Option<AgentId>,
    /// On what.
    pub category: String,
    /// How much.
    pub nanos: Nanos,
}

/// What some companies have spent from a time until before another: whole
/// quarters of an hour from the sums and the deltas that are not folded yet,
/// the edges from the ledger itself.
pub async fn spent(
    tx: &mut PgConnection,
    companies: &[Uuid],
    agent: Option<AgentId>,
    since: DateTime<Utc>,
    end: DateTime<Utc>,
) -> Result<Vec<Spent>, StoreError> {
    let rows = sqlx::query!(
        r#"with bounds as (
               select date_bin('15 minutes', $3::timestamptz + interval '15 minutes' - interval '1 microsecond', 'epoch') as first,
                   greatest(date_bin('15 minutes', $4::timestamptz, 'epoch'),
                            date_bin('15 minutes', $3::timestamptz + interval '15 minutes' - interval '1 microsecond', 'epoch')) as last
           ),
           parts as (
               select r.company_id, r.agent_id, r.category, r.nanos
               from unnest($1::uuid[]) as c (company_id)
               cross join bounds b
               join cost_rollups r on r.company_id = c.company_id and r.quarter >= b.first and r.quarter < b.last
               union all
               select d.company_id, d.agent_id, d.category, d.nanos
               from unnest($1::uuid[]) as c (company_id)
               cross join bounds b
               join cost_deltas d on d.company_id = c.company_id and d.at >= b.first and d.at < b.last
               union all
               select l.company_id, coalesce(l.agent_id, '00000000-0000-0000-0000-000000000000'), l.category, l.nanos
               from unnest($1::uuid[]) as c (company_id)
               cross join bounds b
               join ledger l on l.company_id = c.company_id
                   and (l.at >= $3 and l.at < least(b.first, $4) or l.at >= b.last and l.at < $4)
           )
           select company_id as "company_id!", agent_id as "agent_id!", category as "category!", sum(nanos)::bigint as "nanos!"
           from parts
           where $2::uuid is null or agent_id = $2
           group by company_id, agent_id, category
           order by company_id, agent_id, category"#,
        companies,
        agent.map(|agent| agent.0),
        since,
        end,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Spent {
            company: CompanyId(row.company_id),
            agent: (!row.agent_id.is_nil()).then_some(AgentId(row.agent_id)),
            category: row.category,
            nanos: Nanos(row.nanos),
        })
        .collect())
}

/// What was spent on a calendar day of a time zone, by category.
#[derive(Debug, Clone)]
pub struct SpentOnDay {
    /// The day's place among those that were asked for, from 0.
    pub day: usize,
    /// On what.
    pub category: String,
    /// How much.
    pub nanos: Nanos,
}

/// What a company has spent on each of some days, given by their beginnings in
/// order, until before an end.
pub async fn spent_daily(
    tx: &mut PgConnection,
    company: CompanyId,
    days: &[DateTime<Utc>],
    end: DateTime<Utc>,
) -> Result<Vec<SpentOnDay>, StoreError> {
    let Some(since) = days.first() else { return Ok(Vec::new()) };
    let rows = sqlx::query!(
        r#"select width_bucket(s.at, $4::timestamptz[]) as "day!", s.category as "category!", sum(s.nanos)::bigint as "nanos!"
           from (
               select quarter as at, category, nanos from cost_rollups
               where company_id = $1 and quarter >= $2 and quarter < $3
               union all
               select at, category, nanos from cost_deltas where company_id = $1 and at >= $2 and at < $3
           ) s
           group by 1, 2
           order by 1, 2"#,
        company.0,
        since,
        end,
        days,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| SpentOnDay {
            day: usize::try_from(row.day - 1).unwrap_or(0),
            category: row.category,
            nanos: Nanos(row.nanos),
        })
        .collect())
}

/// The database's time: what "today" means.
pub async fn now(tx: &mut PgConnection) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(r#"select clock_timestamp() as "now!""#).fetch_one(tx).await?)
}

/// Money of a company of which nobody knows yet, or will, what it has bought.
#[derive(Debug, Clone, Copy)]
pub struct Open {
    /// Held for calls that are under way.
    pub reserved: Nanos,
    /// Booked at its worst in a time, for calls of which nobody has heard.
    pub unheard: Nanos,
}

/// That money.
pub async fn open(
    tx: &mut PgConnection,
    company: CompanyId,
    since: DateTime<Utc>,
    until: DateTime<Utc>,
) -> Result<Open, StoreError> {
    let row = sqlx::query!(
        r#"select
               (select coalesce(sum(reserved_nanos), 0)::bigint from journal
                where company_id = $1 and reserved_nanos > 0) as "reserved!",
               (select coalesce(sum(nanos), 0)::bigint from ledger
                where company_id = $1 and unheard and at >= $2 and at < $3) as "unheard!""#,
        company.0,
        since,
        until,
    )
    .fetch_one(tx)
    .await?;
    Ok(Open { reserved: Nanos(row.reserved), unheard: Nanos(row.unheard) })
}

/// Where an entry of the ledger stands, among those of all companies.
pub type LedgerPlace = (Uuid, DateTime<Utc>, i64);

/// An entry of the ledger.
#[derive(Debug, Clone)]
pub struct LedgerRow {
    /// Whose.
    pub company_id: Uuid,
    /// Which.
    pub id: i64,
    /// When.
    pub at: DateTime<Utc>,
    /// On what.
    pub category: String,
    /// So much, in nano-dollars.
    pub nanos: i64,
    /// By which agent.
    pub agent_id: Option<Uuid>,
    /// In which run.
    pub run_id: Option<Uuid>,
    /// At which step.
    pub step: Option<i32>,
    /// Of which model.
    pub model: Option<String>,
    /// Nobody has heard what it cost.
    pub unheard: bool,
}

impl LedgerRow {
    /// Where it stands.
    pub fn place(&self) -> LedgerPlace {
        (self.company_id, self.at, self.id)
    }
}

/// What picks entries of the ledger.
#[derive(Debug, Clone, Copy)]
pub struct LedgerFilter {
    /// Of this account's companies.
    pub account: AccountId,
    /// Of one of them alone.
    pub company: Option<CompanyId>,
    /// At this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Before this time.
    pub before: Option<DateTime<Utc>>,
    /// Behind this one.
    pub after: Option<LedgerPlace>,
}

/// A page of the ledger: company by company, oldest first. It may be short where a company ends; with
/// it comes where the next page begins, if there may be one.
pub async fn ledger(
    tx: &mut PgConnection,
    filter: LedgerFilter,
    limit: i64,
) -> Result<(Vec<LedgerRow>, Option<LedgerPlace>), StoreError> {
    // Before whatever there is.
    let first = |company: Uuid| (company, DateTime::UNIX_EPOCH, 0);
    let start = match filter.after {
        Some(after) => Some(after),
        None => next_company(tx, &filter, None).await?.map(first),
    };
    let Some((company, at, id)) = start else { return Ok((Vec::new(), None)) };
    let rows = sqlx::query_as!(
        LedgerRow,
        r#"select company_id, id, at, category, nanos, agent_id, run_id, step, model, unheard
           from ledger
           where company_id = $1 and (at, id) > ($2, $3)
               and ($4::timestamptz is null or at >= $4) and ($5::timestamptz is null or at < $5)
           order by at, id limit $6"#,
        company,
        at,
        id,
        filter.since,
        filter.before,
        limit,
    )
    .fetch_all(&mut *tx)
    .await?;
    let next = if i64::try_from(rows.len()).is_ok_and(|found| found == limit) {
        rows.last().map(LedgerRow::place)
    } else {
        next_company(tx, &filter, Some(company)).await?.map(first)
    };
    Ok((rows, next))
}

/// The first company of an account that a filter takes in, behind another.
async fn next_company(
    tx: &mut PgConnection,
    filter: &LedgerFilter,
    after: Option<Uuid>,
) -> Result<Option<Uuid>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select id from companies
         where account_id = $1 and ($2::uuid is null or id = $2)
             and id > coalesce($3::uuid, '00000000-0000-0000-0000-000000000000')
         order by id limit 1",
        filter.account.0,
        filter.company.map(|company| company.0),
        after,
    )
    .fetch_optional(tx)
    .await?)
}
