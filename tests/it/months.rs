//! History in months: made ahead, dropped once nothing of them is kept, and never in the way of who
//! writes.

use capx_core::domain::ids::CompanyId;
use capx_core::engine::upkeep;
use capx_core::store::months::{self, WHOLES};
use serde_json::json;
use sqlx::AssertSqlSafe;

use crate::harness::Db;

async fn run(db: &Db, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&db.pool).await.unwrap();
}

async fn texts(db: &Db, sql: &str) -> Vec<String> {
    sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_all(&db.pool).await.unwrap()
}

/// As if the tables, which are empty, had been there for so many months.
async fn grown_old(db: &Db, count: u32) {
    for whole in WHOLES {
        let sql = format!(
            "do $$
             declare
                 begins uuid := least_id(date_trunc('month', now()) - interval '{count} months');
                 name text;
             begin
                 for name in select part from months where whole = '{whole}' loop
                     execute format('alter table {whole} detach partition %I', name);
                     if name not in ('{whole}_past', '{whole}_far') then execute format('drop table %I', name); end if;
                 end loop;
                 delete from months where whole = '{whole}' and part not in ('{whole}_past', '{whole}_far');
                 update months set until_id = begins where part = '{whole}_past';
                 update months set from_id = begins where part = '{whole}_far';
                 execute format('alter table {whole} attach partition {whole}_past for values from (minvalue) to (%L)', begins);
                 execute format('alter table {whole} attach partition {whole}_far for values from (%L) to (maxvalue)', begins);
             end $$"
        );
        run(db, &sql).await;
        run(db, &format!("select make_months('{whole}', '62 days')")).await;
    }
}

/// An event that belongs to no run, so many days ago.
async fn event(db: &Db, company: CompanyId, days: u32) {
    db.invents_events();
    let sql = format!(
        "insert into events (company_id, id, event, data, at)
         select '{}', overlay(least_id(t)::text placing right(gen_random_uuid()::text, 20) from 17)::uuid, 'task.updated', '{{}}', t
         from (select now() - interval '{days} days' as t) n",
        company.0,
    );
    run(db, &sql).await;
}

/// A delivery and its try, so many days ago.
async fn delivery(db: &Db, company: CompanyId, webhook: uuid::Uuid, days: u32, status: &str) {
    let sql = format!(
        "with d as (
             insert into deliveries (webhook_id, id, company_id, event, event_id, data, status, job_id, ended_at, failed_at, created_at)
             select '{webhook}', overlay(least_id(t)::text placing right(gen_random_uuid()::text, 20) from 17)::uuid, '{}',
                 'webhook.test', gen_random_uuid(), '{{}}', '{status}', case when '{status}' = 'pending' then 1 end,
                 case when '{status}' <> 'pending' then t end, case when '{status}' = 'failed' then t end, t
             from (select now() - interval '{days} days' as t) n
             returning webhook_id, id
         )
         insert into delivery_attempts (webhook_id, delivery_id, number, latency_ms) select webhook_id, id, 1, 1 from d",
        company.0
    );
    run(db, &sql).await;
}

const MONTHS: &str = "select part from months where from_id is not null and until_id is not null and whole = ";

#[tokio::test(flavor = "multi_thread")]
async fn a_month_goes_with_the_last_that_is_kept_of_it() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    run(&db, "delete from events").await;
    grown_old(&db, 12).await;
    let webhook = uuid::Uuid::now_v7();
    let hook = "insert into webhooks (id, account_id, url, events, secret, status, disabled_reason)
        select $1, account_id, 'https://a.example/', '{*}', decode(repeat('00', 32), 'hex'), 'disabled', 'a test' from companies limit 1";
    sqlx::query(hook).bind(webhook).execute(&db.pool).await.unwrap();
    // Deliveries are kept for 30 days, for 90 if they failed; one that is not over, whatever its age.
    for (days, status) in
        [(300, "succeeded"), (270, "failed"), (200, "pending"), (199, "succeeded"), (150, "succeeded")]
    {
        delivery(&db, company, webhook, days, status).await;
    }
    for (days, status) in [(70, "failed"), (2, "succeeded")] {
        delivery(&db, company, webhook, days, status).await;
    }
    for days in [290, 200, 120, 60, 0] {
        event(&db, company, days).await;
    }
    sqlx::query("insert into event_marks (at, oldest, newest) select now() - interval '91 days', pg_current_xact_id(), pg_current_xact_id()")
        .execute(&db.pool)
        .await
        .unwrap();
    let months = async |whole: &str| texts(&db, &format!("{MONTHS}'{whole}' order by from_id")).await;
    let before = months("deliveries").await;
    let ages =
        "select floor(extract(epoch from now() - created_at) / 86400) || ' ' || status from deliveries order by id";
    let tries = "select count(*) from delivery_attempts a
        join deliveries d on d.webhook_id = a.webhook_id and d.id = a.delivery_id";
    upkeep::all(&db.engine).await.unwrap();
    assert_eq!(texts(&db, ages).await, ["200 pending", "70 failed", "2 succeeded"]);
    assert_eq!((db.count(tries).await, db.count("select count(*) from delivery_attempts").await), (3, 3));
    // Up to the month of what is not over.
    let first = "select tableoid::regclass::text from deliveries order by id limit 1";
    let after = months("deliveries").await;
    assert!(after.len() < before.len() && before.ends_with(&after), "{before:?} {after:?}");
    assert_eq!(texts(&db, first).await[..], after[..1]);
    run(&db, "update deliveries set status = 'succeeded', job_id = null, ended_at = now() - interval '50 days' where status = 'pending'")
        .await;
    upkeep::all(&db.engine).await.unwrap();
    // With it the empty ones behind it, up to the next that holds something.
    let last = months("deliveries").await;
    assert!(last.len() < after.len() && after.ends_with(&last), "{after:?} {last:?}");
    assert_eq!(texts(&db, first).await[..], last[..1]);
    assert_eq!(texts(&db, ages).await, ["70 failed", "2 succeeded"]);
    // Every id has its part, still.
    for whole in WHOLES {
        let gaps = format!(
            "select a.part from months a where whole = '{whole}' and until_id is not null
                 and not exists (select from months b where b.whole = a.whole and b.from_id = a.until_id)"
        );
        assert!(texts(&db, &gaps).await.is_empty(), "{whole}");
    }
    event(&db, company, 290).await;
    assert_eq!(db.count("select count(*) from only events_past").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_a_part_for_every_id_and_months_are_made_ahead() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    run(&db, "delete from events").await;
    db.invents_events();
    // Clocks may be wrong by any time: nothing that happens is refused.
    for id in [
        "00000000-0000-0000-0000-000000000000".to_owned(),
        "ffffffff-ffff-ffff-ffff-ffffffffffff".to_owned(),
        texts(&db, "select least_id(now() + interval '100 days')::text").await.remove(0),
        texts(&db, "select least_id(now() + interval '400 days')::text").await.remove(0),
    ] {
        let sql = "insert into events (company_id, id, event, data) values ($1, $2::text::uuid, 'task.updated', '{}')";
        sqlx::query(sql).bind(company.0).bind(id).execute(&db.pool).await.unwrap();
    }
    let far = "select count(*) from only events_far";
    assert_eq!((db.count(far).await, db.count("select count(*) from events").await), (3, 4));
    assert_eq!(months::make(&db.engine.pool, "events").await.unwrap(), 0, "there are enough");
    // Time passes, as it were: what is no longer far away has its month, and nothing is lost.
    run(&db, "set role capx_system; select make_months('events', '130 days')").await;
    assert_eq!((db.count(far).await, db.count("select count(*) from events").await), (2, 4));
    // Nobody gets past the table's rules by a part's name, or drops what they like.
    for role in ["capx_api", "capx_system"] {
        let seen = format!("set role {role}; select count(*) from events_far");
        assert!(sqlx::raw_sql(AssertSqlSafe(seen)).execute(&db.pool).await.is_err(), "{role}");
    }
    let cut = "set role capx_api; select drop_month('events')";
    assert!(sqlx::raw_sql(cut).execute(&db.pool).await.unwrap_err().to_string().contains("permission denied"));
    assert!(months::make(&db.engine.pool, "runs").await.is_err(), "it is not cut into months");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_is_in_nobodys_way_and_old_versions_delete_nothing_of_others() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    run(&db, "delete from events").await;
    grown_old(&db, 6).await;
    event(&db, company, 240).await;
    event(&db, company, 0).await;
    let months = "select count(*) from months where whole = 'events'";
    let before = db.count(months).await;
    // What is being written holds the oldest month, which looks empty.
    let mut writer = db.pool.begin().await.unwrap();
    let sql = "insert into events (company_id, id, event, data)
        select $1, least_id(date_trunc('month', now()) - interval '6 months' + interval '1 day'), 'task.updated', '{}'";
    sqlx::query(sql).bind(company.0).execute(&mut *writer).await.unwrap();
    assert!(months::drop_oldest(&db.engine.pool, "events").await.is_err(), "it is in use");
    writer.commit().await.unwrap();
    assert_eq!(months::drop_oldest(&db.engine.pool, "events").await.unwrap(), None, "it is no longer empty");
    assert_eq!((db.count(months).await, db.count("select count(*) from events").await), (before, 3));
    // By a row's place, as versions did before there were months.
    let by_place = "delete from events where ctid = any (array(select ctid from events where company_id = $1 limit 1))";
    let refused = sqlx::query(by_place).bind(company.0).execute(&db.engine.pool).await.unwrap_err().to_string();
    assert!(refused.contains("newer version"), "{refused}");
    assert_eq!(db.count("select count(*) from events").await, 3);
    // A company that is deleted takes its own with it, of whatever month.
    event(&db, CompanyId::new(), 0).await;
    while capx_core::store::purge::some(&db.engine.pool, company).await.unwrap() {}
    assert_eq!(db.count("select count(*) from events").await, 1);
}
