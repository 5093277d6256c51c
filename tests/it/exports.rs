//! Logs leave as streams: all of them, in order, and no more of them in memory than two pages.

use serde_json::{Value, json};

use crate::harness::{Api, Db};

async fn text(api: &Api, path: &str) -> (String, String) {
    let response = api.raw("GET", path, &[], None).await;
    assert_eq!(response.status(), 200, "{path}");
    let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
    (kind, response.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn activity_and_ledger_are_exported_whole() {
    let db = Db::new().await;
    db.invents_events();
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let other = db.company(&["a"], "claude", json!({})).await;
    let sql = "insert into events (company_id, id, event, data)
               select $1, gen_random_uuid(), 'task.created', jsonb_build_object('title', '=cmd()' || n) from generate_series(1, 1501) n";
    sqlx::query(sql).bind(company.0).execute(&db.pool).await.unwrap();
    let sql = "insert into ledger (company_id, category, nanos, model)
               select c, 'inference', n, '=x' from unnest($1::uuid[]) c, generate_series(1, 1200) n";
    sqlx::query(sql).bind(vec![company.0, other.0]).execute(&db.pool).await.unwrap();

    let of = format!("company_id={company}");
    let (kind, lines) = text(&api, &format!("/v1/activity/export?{of}")).await;
    assert_eq!(kind, "application/x-ndjson");
    let told: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(told.iter().filter(|event| event["event"] == "task.created").count(), 1_501);
    let (_, page) = api.get(&format!("/v1/companies/{company}/activity?limit=50")).await;
    assert_eq!(page["data"].as_array().unwrap()[..], told[..50], "as the log shows it, oldest first");
    let mut ids: Vec<&str> = told.iter().map(|event| event["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), told.len(), "each once");

    let (kind, table) = text(&api, "/v1/costs/export?format=csv").await;
    assert_eq!(kind, "text/csv; charset=utf-8");
    assert_eq!(table.lines().count(), 1 + 2_400);
    assert!(table.starts_with("id,timestamp,company_id,category,"), "{}", &table[..80]);
    assert!(table.lines().nth(1).unwrap().contains(",inference,,,,'=x,0.00000000"), "no spreadsheet's formula");
    let nanos = |line: &str| line.rsplit(',').nth(1).unwrap().trim_start_matches("0.").parse::<u64>().unwrap();
    assert_eq!(table.lines().skip(1).map(nanos).sum::<u64>(), 2 * 1_200 * 1_201 / 2, "to the nano-dollar");
    let (_, none) = text(&api, "/v1/costs/export?until=2020-01-01").await;
    assert_eq!(none, "");

    // Nobody's but one's own.
    let bound = capx::keys::make(&db.pool, db.account, Some(other), "b", true, &["*".into()]).await.unwrap();
    let (_, lines) = text(&api.with(&bound.key), "/v1/costs/export").await;
    assert_eq!(lines.lines().count(), 1_200);
    assert_eq!(api.with(&bound.key).get(&format!("/v1/activity/export?{of}")).await.0, 404);
    for wrong in ["format=xml", "since=yesterday", "since=2026-01-02&until=2026-01-01", "fromat=csv"] {
        assert_eq!(api.get(&format!("/v1/activity/export?{wrong}")).await.0, 400, "{wrong}");
    }
}
