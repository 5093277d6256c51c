//! The audit log: what was decided and done, and whoever changes that later is found out.

use std::process::Command;

use capx_core::domain::audit::Entry;
use capx_core::store::audit;
use serde_json::{Value, json};

use crate::harness::{Db, SHORT_LEASE, eventually};

/// `capx audit …`: its code and its words.
fn capx(db: &Db, args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_capx"))
        .arg("audit")
        .args(args)
        .env("CAPX_DATABASE_URL", &db.url)
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_decided_and_done_stands_there() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let script = json!({"work": [
        {"tool_calls": [{"name": "file_write", "input": {"path": "a", "content": "b"}}, {"name": "http_request", "input": {"url": "https://example.com"}}]},
        {"output": {}},
    ]});
    let agents = json!([{"role": "a", "adapter": "claude", "instructions": "x", "config": {"script": script}}]);
    let governance =
        json!({"approval_required": ["file.write"], "execution_policy": {"blocked_tools": ["http.request"]}});
    let (_, made) = api.post("/v1/companies", json!({"name": "c", "governance": governance, "agents": agents})).await;
    let company = made["data"]["id"].as_str().unwrap().to_owned();
    eventually("the company to run", || async {
        api.get(&format!("/v1/companies/{company}")).await.1["data"]["status"] == "running"
    })
    .await;
    let yaml = "name: w\nsteps:\n  - {id: do, role: a, action: work}\n";
    let (_, made) = api.post(&format!("/v1/companies/{company}/playbooks"), json!({"yaml": yaml})).await;
    let playbook = made["data"]["id"].as_str().unwrap();
    let (_, started) = api.post(&format!("/v1/companies/{company}/playbooks/{playbook}/run"), json!({})).await;
    let pending = format!("/v1/companies/{company}/approvals?status=pending");
    eventually("a person to be asked", || async { api.get(&pending).await.1["data"][0].is_object() }).await;
    let asked = api.get(&pending).await.1["data"][0].clone();
    api.post(&format!("/v1/approvals/{}/approve", asked["id"].as_str().unwrap()), json!({"note": "fine"})).await;
    let run = started["data"]["run_id"].as_str().unwrap();
    assert_eq!(api.get(&format!("/v1/runs/{run}?wait=30")).await.1["data"]["status"], "completed");
    api.send("PATCH", &format!("/v1/companies/{company}"), Some(json!({"governance": null}))).await;
    api.post(&format!("/v1/companies/{company}/kill"), json!({})).await;
    let (status, log) = api.get(&format!("/v1/companies/{company}/audit")).await;
    assert_eq!(status, 200, "{log}");
    let log = log["data"].as_array().unwrap();
    let kinds: Vec<&str> = log.iter().rev().map(|entry| entry["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["approval.resolved", "call.made", "call.denied", "company.changed", "company.killed"]);
    let decided = &log[4]["data"];
    assert_eq!(
        (&decided["decision"], &decided["words"], &decided["digest"]),
        (&json!("approved"), &json!("fine"), &asked["digest"])
    );
    assert!(
        log[4]["actor"].as_str().unwrap().starts_with("key_") && log[3]["actor"].as_str().unwrap().starts_with("ag_")
    );
    assert_eq!(log[0]["prev"], log[1]["hash"]);
    let (code, said) = capx(&db, &["verify"]);
    assert!(code == Some(0) && said.contains("5 entries"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_changes_it_is_found_out() {
    let db = Db::new().await;
    let [one, other] = [db.company(&["a"], "claude", json!({})).await, db.company(&["a"], "claude", json!({})).await];
    // Many at once: there is one chain.
    let writers = (0..64).map(|n| {
        let pool = db.engine.pool.clone();
        tokio::spawn(async move {
            for at in 0..5 {
                let mut tx = pool.begin().await.unwrap();
                let company = if n % 2 == 0 { one } else { other };
                audit::append(&mut tx, company, &Entry::new("x", "key", json!({"n": n, "at": at}))).await.unwrap();
                tx.commit().await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let (code, said) = capx(&db, &["verify", "--json"]);
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &told["entries"], &told["faults"]), (Some(0), &json!(320), &json!([])), "{said}");
    let kept = db.files.with_extension("heads");
    std::fs::create_dir_all(kept.parent().unwrap()).unwrap();
    std::fs::write(&kept, capx(&db, &["heads"]).1).unwrap();
    let kept = kept.to_str().unwrap();
    // The log's own users cannot change it at all.
    for sql in ["update audit set actor = 'me'", "delete from audit"] {
        let mut tx = db.engine.pool.begin().await.unwrap();
        assert!(sqlx::query(sql).execute(&mut *tx).await.is_err(), "{sql}");
    }
    // Whoever owns the database can, and is found out.
    for (what, sql, place) in [
        ("edited", "update audit set data = '{}' where seq = 7", "entry 7 is not what was written"),
        ("cut out", "delete from audit where seq = 9", "entry 9 is missing"),
        (
            "reordered",
            "update audit a set data = b.data, hash = b.hash from audit b where a.company_id = b.company_id and a.seq = 4 and b.seq = 5",
            "entry 4",
        ),
        ("tail", "delete from audit where seq > 150", "its tail was cut"),
        (
            "grafted",
            "update audit a set (data, hash, prev, at) = (select data, hash, prev, at from audit b where b.company_id <> a.company_id and b.seq = a.seq)",
            "entry 1",
        ),
    ] {
        let mut tx = db.pool.begin().await.unwrap();
        sqlx::query("create table if not exists kept as select * from audit").execute(&mut *tx).await.unwrap();
        sqlx::query(sql).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        let (code, said) = capx(&db, &["verify"]);
        assert!(code == Some(1) && said.contains(place), "{what}: {said}");
        sqlx::raw_sql("truncate audit; insert into audit select * from kept; drop table kept")
            .execute(&db.pool)
            .await
            .unwrap();
        assert_eq!(capx(&db, &["verify"]).0, Some(0), "{what}");
    }
    // Written anew as a whole, it is found by what was kept outside.
    sqlx::raw_sql("truncate audit, audit_heads").execute(&db.pool).await.unwrap();
    for n in 0..160 {
        for company in [one, other] {
            let mut tx = db.engine.pool.begin().await.unwrap();
            audit::append(&mut tx, company, &Entry::new("x", "key", json!({"n": n}))).await.unwrap();
            tx.commit().await.unwrap();
        }
    }
    assert_eq!(capx(&db, &["verify"]).0, Some(0));
    let (code, said) = capx(&db, &["verify", "--heads", kept]);
    assert!(code == Some(1) && said.contains("was written anew"), "{said}");
    sqlx::raw_sql("truncate audit, audit_heads").execute(&db.pool).await.unwrap();
    let (code, said) = capx(&db, &["verify", "--heads", kept]);
    assert!(code == Some(1) && said.contains("its whole log is gone"), "{said}");
}
