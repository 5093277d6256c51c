//! What was spent and how often playbooks ran: from roll-ups and the deltas
//! that are not folded into them yet.

use sqlx::PgConnection;

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
