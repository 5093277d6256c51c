//! What was spent and how often playbooks ran: from roll-ups and the deltas
//! that are not folded into them yet.

use sqlx::{PgConnection, PgPool};

use super::StoreError;
use super::agents::AgentRow;
use super::playbooks::PlaybookRow;
use crate::domain::ids::CompanyId;
use crate::domain::money::Nanos;

/// All that a company has spent.
pub async fn company_total(tx: &mut PgConnection, company: CompanyId) -> Result<Nanos, StoreError> {
    Ok(Nanos(
        sqlx::query_scalar!(
            r#"select least((select coalesce(sum(nanos), 0) from cost_totals where company_id = $1)
                          + (select coalesce(sum(nanos), 0) from cost_deltas where company_id = $1),
                          9223372036854775807)::bigint as "nanos!""#,
            company.0,
        )
        .fetch_one(tx)
        .await?,
    ))
}

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
    .fetch_all(tx)
    .await?;
    for row in rows {
        for agent in agents.iter_mut().filter(|agent| agent.agent.0 == row.id) {
            agent.cost = Nanos(row.nanos);
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
