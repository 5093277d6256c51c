//! Reads at size: no list walks what it does not show, whatever the filter.

use capx_core::domain::ids::CompanyId;
use serde_json::json;

use crate::harness::{Db, eventually};

/// Rows of each table that nobody asks for.
const GROWN_BY: i64 = 20_000;
/// Rows that all the lists together may read of one table or index.
const READ_MAX: i64 = 8_000;
const TABLES: &[&str] = &[
    "runs",
    "tasks",
    "approvals",
    "events",
    "playbooks",
    "playbook_versions",
    "agents",
    "cost_rollups",
    "cost_totals",
    "run_totals",
    "companies",
    "dead_letters",
    "webhooks",
];

async fn execute(db: &Db, sql: &str, company: CompanyId) {
    let sql = sqlx::AssertSqlSafe(sql.to_owned());
    sqlx::query(sql).bind(company.0).bind(GROWN_BY).execute(&db.pool).await.unwrap();
}

/// A company with a long history, in which what is asked for is rare and old,
/// beside another account's that is as long and younger.
async fn grow(db: &Db, company: CompanyId, playbook: uuid::Uuid, agent: uuid::Uuid) {
    // Ids that sort by n; the first few of each table are the rare ones.
    let id = "('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid";
    let rare = "n <= 20";
    for sql in [
        format!(
            "insert into runs (company_id, id, playbook_id, version_id, job_id, status, trigger, params, waiting_on, ended_at, started_at)
             select $1, {id}, '{playbook}', '{playbook}', -n, s, 'api', '{{}}',
                 case when s = 'suspended' then '[]'::jsonb end, case when s not in ('running', 'suspended') then now() end, now()
             from generate_series(1, $2) n
             cross join lateral (select case when {rare} then (array['running', 'failed', 'cancelled', 'suspended'])[n % 4 + 1] else 'completed' end as s) s"
        ),
        format!(
            "insert into tasks (company_id, id, agent_id, title, status, priority, ended_at, created_at, approval)
             select $1, {id}, case when {rare} then '{agent}'::uuid end, 't', s, case when {rare} then 'critical' else 'low' end,
                 case when s in ('completed', 'failed') then now() end, now() - interval '60 days',
                 case when {rare} then (array['pending', 'rejected'])[n % 2 + 1] else 'approved' end
             from generate_series(1, $2) n
             cross join lateral (select case when {rare} then (array['pending', 'failed', 'pending_approval'])[n % 3 + 1] else 'completed' end as s) s"
        ),
        format!(
            "insert into approvals (company_id, id, run_id, step, job_id, status, action, playbook, step_name, context, digest, expires_at, decided_at)
             select $1, overlay({id}::text placing '1' from 18)::uuid, gen_random_uuid(), 0, -1, s, '', '', '', '{{}}', '', now(), case when s <> 'pending' then now() end
             from generate_series(1, $2) n
             cross join lateral (select case when {rare} then (array['pending', 'expired'])[n % 2 + 1] else 'approved' end as s) s"
        ),
        format!(
            "insert into events (company_id, id, event, data)
             select $1, {id}, case when {rare} then 'task.created' else 'step.completed' end,
                 case when {rare} then '{{\"agent_id\": \"AGENT\"}}'::jsonb else '{{}}'::jsonb end
             from generate_series(1, $2) n"
        )
        .replace("AGENT", &capx_core::domain::ids::AgentId(agent).to_string()),
        format!(
            "insert into dead_letters (company_id, id, queue, kind, step, reason, attempt, crash_count, error)
             select $1, {id}, 'steps', 'step', 0, case when {rare} then 'quarantined' else 'invalid' end, 1, 0, '{{}}'
             from generate_series(1, $2) n"
        ),
        "insert into cost_rollups (company_id, quarter, agent_id, category, nanos)
         select $1, date_trunc('hour', now()) - interval '60 days' - n * interval '15 minutes', '00000000-0000-0000-0000-000000000000', 'inference', 1
         from generate_series(1, $2) n".into(),
    ] {
        execute(db, &sql, company).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_list_walks_what_it_does_not_show() {
    let db = Db::new().await;
    db.invents_events();
    let api = db.api().await;
    let company = db.company(&["writer"], "claude", json!({})).await;
    let playbook = db.playbook(company, "name: p\nsteps: [{id: a, action: transform}]\n").await;
    let agent: uuid::Uuid = sqlx::query_scalar("select id from agents").fetch_one(&db.pool).await.unwrap();
    sqlx::raw_sql("update companies set status = 'running'").execute(&db.pool).await.unwrap();
    grow(&db, company, playbook.0, agent).await;
    // Another account's, younger than all of this one's.
    let other = capx_core::store::tenants::account(&db.pool, "other", "enterprise").await.unwrap();
    let others = CompanyId::new();
    for sql in [
        format!("insert into companies (id, account_id, name, status) select $1, '{}', 'x', 'running' where $2 > 0", other.0),
        format!("insert into companies (id, account_id, name, status) select gen_random_uuid(), '{}', 'x', case when n % 2 = 0 then 'paused' else 'running' end from generate_series(1, $2) n where $1 is not null", other.0),
        "insert into playbooks (company_id, id, name, status, current_version_id)
         select $1, ('ff900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'p' || n, 'active', gen_random_uuid()
         from generate_series(1, $2) n".into(),
        "insert into approvals (company_id, id, run_id, step, job_id, status, action, playbook, step_name, context, digest, expires_at)
         select $1, ('ff900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, gen_random_uuid(), 0, -1, 'pending', '', '', '', '{}', '', now()
         from generate_series(1, $2) n".into(),
        "insert into events (company_id, id, event, data)
         select $1, gen_random_uuid(), 'task.created', '{}' from generate_series(1, $2) n".into(),
        format!("insert into webhooks (id, account_id, company_id, url, events, secret)
         select ('ff900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, '{}', $1, 'https://x', '{{*}}', sha256('')
         from generate_series(1, $2) n", other.0),
    ] {
        execute(&db, &sql, others).await;
    }
    let tables = db.with_months(TABLES).await;
    for table in &tables {
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("vacuum analyze {table}"))).execute(&db.pool).await.unwrap();
    }
    let written = "select coalesce(sum(n_tup_ins), 0)::bigint from pg_stat_user_tables where relname in ('runs', 'tasks', 'approvals') or relname like 'events%'";
    eventually("the server's counters", || async { db.count(written).await >= 6 * GROWN_BY }).await;
    sqlx::raw_sql("select pg_stat_reset()").execute(&db.pool).await.unwrap();

    let co = format!("/v1/companies/{company}");
    let runs = format!("{co}/playbooks/{playbook}/runs");
    let mut asked = 0;
    for (path, shown) in [
        ("/v1/companies".to_owned(), 1),
        ("/v1/companies?status=running".into(), 1),
        ("/v1/companies?status=stopped".into(), 0),
        (format!("{co}/tasks"), 25),
        (format!("{co}/tasks?status=pending"), 6),
        (format!("{co}/tasks?status=failed"), 7),
        (format!("{co}/tasks?priority=critical"), 20),
        (format!("{co}/tasks?agent_id=writer"), 20),
        (format!("{co}/tasks?since=2099-01-01"), 0),
        (format!("{co}/approvals"), 25),
        (format!("{co}/approvals?status=pending"), 20),
        (format!("{co}/approvals?status=expired"), 10),
        ("/v1/approvals?status=pending".into(), 20),
        ("/v1/playbooks".into(), 1),
        (format!("{co}/playbooks?status=archived"), 0),
        (runs.clone(), 25),
        (format!("{runs}?status=running"), 5),
        (format!("{runs}?status=suspended"), 5),
        (format!("{runs}?status=failed"), 5),
        (format!("{runs}?status=cancelled"), 5),
        (format!("{runs}?status=completed"), 25),
        (format!("/v1/playbooks/{playbook}/runs?status=running"), 5),
        (format!("{co}/activity?limit=10"), 10),
        (format!("{co}/activity?type=task"), 20),
        (format!("{co}/activity?agent_id=writer"), 20),
        (format!("{co}/agents/writer/activity"), 20),
        ("/v1/activity?type=task".into(), 20),
        ("/v1/activity?limit=10".into(), 10),
        (format!("{co}/agents"), 1),
        ("/v1/dead-letters".into(), 25),
        ("/v1/dead-letters?reason=quarantined".into(), 20),
        (format!("/v1/dead-letters?reason=exhausted&company_id={company}"), 0),
        ("/v1/webhooks".into(), 0),
    ] {
        let (status, answer) = api.get(&path).await;
        assert_eq!(status, 200, "{path}: {answer}");
        assert_eq!(answer["data"].as_array().unwrap().len(), shown, "{path}");
        asked += 1;
    }
    for path in [format!("{co}/costs"), format!("{co}/costs/daily"), format!("{co}/costs/forecast"), "/v1/costs".into()]
    {
        let (status, answer) = api.get(&path).await;
        assert_eq!(status, 200, "{path}: {answer}");
    }
    // Everything told: the API's connections are gone, their counters written.
    drop(api);
    let read = "select coalesce(sum(idx_scan), 0)::bigint from pg_stat_user_tables where relname in ('runs', 'tasks')";
    eventually("the server's counters", || async { db.count(read).await >= asked / 3 }).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_200)).await;
    let read: Vec<(String, i64)> = sqlx::query_as(
        "select relname::text, seq_tup_read from pg_stat_user_tables where relname = any ($1)
         union all
         select indexrelname::text, idx_tup_read from pg_stat_user_indexes where relname = any ($1)",
    )
    .bind(&tables)
    .fetch_all(&db.pool)
    .await
    .unwrap();
    let walked: Vec<_> = read.iter().filter(|(_, rows)| *rows >= READ_MAX).collect();
    assert!(walked.is_empty(), "{walked:?}");
}
