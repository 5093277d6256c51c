//! What is too large to be kept inline: kept apart, passed on, found again.

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use capx_core::domain::artifact::Artifact;
use capx_core::domain::digest::{hex, sha256};
use capx_core::domain::ids::{ApprovalId, CompanyId};
use capx_core::domain::run::RunStatus;
use capx_core::engine::gates::Verdict;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

/// Where a worker may die over an artifact, and how often it comes there first.
pub const KEPT: &[(&str, u32)] =
    &[("artifact.booked", 1), ("artifact.in_part", 1), ("artifact.in_part", 2), ("artifact.stored", 1)];

/// Bytes that are no text, of which no two chunks are the same.
fn picture() -> Vec<u8> {
    (0..3_300_000_u32).map(|n| u8::try_from(n.wrapping_mul(2_654_435_761) >> 24).unwrap()).collect()
}

fn report() -> String {
    json!({"rows": vec!["a row of the report"; 15_000]}).to_string()
}

async fn serve(uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let json = [("content-type", "application/json")];
    match uri.path() {
        "/picture" => ([("content-type", "image/png")], picture()).into_response(),
        "/report" => (json, report()).into_response(),
        "/small" => ([("content-type", "application/zip")], b"PK\x03\x04\0\xff".to_vec()).into_response(),
        "/nul" => (json, "{\"text\": \"a\\u0000b\"}").into_response(),
        "/deep" => (json, format!("{}1{}", "[".repeat(64), "]".repeat(64))).into_response(),
        "/latin" => ([("content-type", "text/plain")], b"caf\xe9".to_vec()).into_response(),
        "/endless" => {
            let chunk = Bytes::from(vec![b'x'; 1024 * 1024]);
            let chunks = (0..120).map(move |_| Ok::<_, std::io::Error>(chunk.clone()));
            Body::from_stream(futures_util::stream::iter(chunks)).into_response()
        }
        "/agent" => {
            (json, json!({"output": {"text": "word ".repeat(80_000), "title": "t"}}).to_string()).into_response()
        }
        _ => {
            let kind = headers.get("content-type").map(|kind| kind.to_str().unwrap().to_owned());
            (json, json!({"sha256": hex(&sha256(&body)), "bytes": body.len(), "type": kind}).to_string())
                .into_response()
        }
    }
}

async fn server() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router =
        axum::Router::new().fallback(axum::routing::any(serve)).layer(axum::extract::DefaultBodyLimit::disable());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

async fn fetch(api: &Api, company: CompanyId, artifact: &str, tag: Option<&str>) -> reqwest::Response {
    let url = format!("{}/v1/companies/{company}/artifacts/{artifact}", api.base);
    let request = api.client.get(url).bearer_auth(&api.key);
    let request = if let Some(tag) = tag { request.header("if-none-match", tag) } else { request };
    request.send().await.unwrap()
}

fn reference(value: &Value) -> Artifact {
    Artifact::of(value).unwrap_or_else(|| panic!("no reference: {value:.200}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_kept_apart_and_passed_on() {
    let db = Db::new().await;
    let (url, api) = (server().await, db.api().await);
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["writer"], "custom", json!({"endpoint": format!("{url}/agent")})).await;
    let yaml = format!(
        "
name: large
inputs: {{text: string}}
steps:
  - {{id: get, action: http.request, params: {{url: '{url}/picture'}}}}
  - {{id: write, action: file.write, params: {{path: a.png, content: '${{steps.get.output.body}}'}}}}
  - {{id: read, action: file.read, params: {{path: a.png}}}}
  - {{id: send, action: http.request, params: {{method: POST, url: '{url}/x', body: '${{steps.get.output.body}}'}}}}
  - {{id: report, action: http.request, params: {{url: '{url}/report'}}}}
  - {{id: small, action: http.request, params: {{url: '{url}/small'}}}}
  - {{id: latin, action: http.request, params: {{url: '{url}/latin'}}}}
  - {{id: nul, action: http.request, params: {{url: '{url}/nul'}}}}
  - {{id: deep, action: http.request, params: {{url: '{url}/deep'}}}}
  - {{id: wide, action: transform, params: {{a: '${{inputs.text}}', b: ['${{inputs.text}}', 1], title: t}}}}
  - {{id: told, role: writer, action: write, output: {{text: {{type: string, required: true}}, title: string}}}}
  - {{id: copy, action: file.write, params: {{path: b.txt, content: '${{steps.told.output.text}}'}}}}
  - {{id: each, for_each: [1, 2, 3], action: transform, params: {{n: '${{item}}', text: '${{inputs.text}}'}}}}
  - {{id: kept, action: file.write, params: {{path: list.json, content: '${{steps.each.output}}'}}}}
  - {{id: again, for_each: '${{steps.each.output}}', action: transform, on_failure: continue}}
output: ${{steps.get.output.body}}
"
    );
    let playbook = db.playbook(company, &yaml).await;
    let text = "ü".repeat(75_000);
    let run = db.start(company, playbook, json!({"text": text})).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    let (_, shown) = api.get(&format!("/v1/runs/{run}")).await;
    let output = |step: usize| &shown["data"]["steps"][step]["output"];
    let digest = hex(&sha256(picture()));

    let got = reference(&output(0)["body"]);
    assert_eq!((got.sha256.as_str(), got.bytes, got.content_type.as_str()), (digest.as_str(), 3_300_000, "image/png"));
    assert_eq!(output(0)["status"], json!(200));
    assert_eq!(row.output.unwrap(), got.to_value());
    assert_eq!((&output(1)["sha256"], &output(1)["bytes"]), (&json!(digest), &json!(3_300_000)));
    assert_eq!(reference(&output(2)["content"]).sha256, digest);
    assert_eq!(output(3)["body"], json!({"sha256": digest, "bytes": 3_300_000, "type": "image/png"}));
    assert_eq!(reference(&output(4)["body"]).sha256, hex(&sha256(report())), "as it came");
    assert_eq!(reference(&output(5)["body"]).bytes, 6, "no text");
    assert_eq!(output(6)["body"], json!("caf\u{fffd}"));
    // JSON that Postgres would not keep, or that is too deep for us, is text.
    assert_eq!(output(7)["body"], json!("{\"text\": \"a\\u0000b\"}"));
    assert_eq!(output(8)["body"].as_str().unwrap().len(), 129);
    // The largest goes, the rest stays.
    assert_eq!((&output(9)["a"], &output(9)["title"]), (&json!(text), &json!("t")));
    let list = reference(&output(9)["b"]);
    assert_eq!(fetch(&api, company, &list.sha256, None).await.json::<Value>().await.unwrap(), json!([text, 1]));
    assert_eq!(output(10)["title"], json!("t"));
    assert_eq!(output(11)["sha256"], json!(hex(&sha256("word ".repeat(80_000)))));
    let each = reference(output(12));
    let of_items = fetch(&api, company, &each.sha256, None).await.json::<Value>().await.unwrap();
    assert_eq!(of_items, json!([1, 2, 3].map(|n| json!({"n": n, "text": text}))));
    assert_eq!(output(13)["sha256"], json!(each.sha256));
    let why = shown["data"]["steps"][14]["error"]["message"].as_str().unwrap();
    assert!(why.contains("the list is an artifact"), "{why}");

    let answer = fetch(&api, company, &digest, None).await;
    assert_eq!(answer.status(), 200);
    for (name, value) in [
        ("content-type", "image/png"),
        ("content-length", "3300000"),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "sandbox"),
    ] {
        assert_eq!(answer.headers()[name], value);
    }
    let tag = answer.headers()["etag"].to_str().unwrap().to_owned();
    assert!(answer.bytes().await.unwrap() == picture());
    assert_eq!(fetch(&api, company, &digest, Some(&tag)).await.status(), 304);
    let other = db.company(&["a"], "claude", json!({})).await;
    for (company, artifact) in [(other, digest.as_str()), (company, "nonsense"), (company, &"0".repeat(64))] {
        assert_eq!(fetch(&api, company, artifact, None).await.status(), 404, "{artifact}");
    }
    // Once for all who have said the same.
    assert_eq!(db.count("select count(*) from artifacts").await, 6);
    let lost = "select count(*) from artifacts a where bytes <> (select sum(octet_length(data)) from artifact_chunks c
                where c.company_id = a.company_id and c.sha256 = a.sha256)";
    assert_eq!(db.count(lost).await, 0);
    assert_eq!(api.post(&format!("/v1/companies/{company}/stop"), json!({})).await.0, 200);
    assert_eq!(api.send("DELETE", &format!("/v1/companies/{company}"), None).await.0, 200);
    eventually("all of it to be gone", || async {
        let left = "select (select count(*) from artifacts) + (select count(*) from artifact_chunks)
                        + (select count(*) from run_artifacts)";
        db.count(left).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_for_an_artifact_fails_its_step() {
    let db = Db::new().await;
    let url = server().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = format!(
        "name: endless\nsteps:\n  - {{id: endless, action: http.request, params: {{url: '{url}/endless'}}, on_failure: continue}}\n  \
         - {{id: gate, action: transform, approval: required}}\n  \
         - {{id: full, action: http.request, params: {{url: '{url}/small'}}}}\n"
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Suspended).await;
    let why: String =
        sqlx::query_scalar("select error->>'message' from run_steps where step = 0").fetch_one(&db.pool).await.unwrap();
    assert_eq!(why, "the answer is larger than 104857600 bytes");
    // Others of the run have come to a gigabyte, but for five bytes.
    sqlx::query("insert into run_artifacts (company_id, run_id, sha256, bytes) values ($1, $2, 'x', 1073741824 - 5)")
        .bind(company.0)
        .bind(run.0)
        .execute(&db.pool)
        .await
        .unwrap();
    let gate =
        sqlx::query_scalar("select id from approvals where status = 'pending'").fetch_one(&db.pool).await.unwrap();
    db.decide(ApprovalId(gate), &Verdict::Approve { note: None, params: None }).await.unwrap();
    let row = db.until(company, run, RunStatus::Failed).await;
    let error = row.error.unwrap();
    assert_eq!(error["code"], json!("invalid"));
    assert!(error["message"].as_str().unwrap().contains("over the limit of 1073741824 bytes together"), "{error}");
    assert_eq!(db.count("select count(*) from artifacts").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_is_whole_whoever_dies_over_it() {
    for (point, hit) in KEPT.iter().copied().chain([("commit.before", 2)]) {
        let db = Db::new().await;
        let (url, api) = (server().await, db.api().await);
        let company = db.company(&["a"], "claude", json!({})).await;
        let yaml = format!(
            "name: dies\nsteps:\n  - {{id: a, action: transform}}\n  \
             - {{id: get, action: http.request, params: {{url: '{url}/picture'}}}}\n  \
             - {{id: send, action: http.request, params: {{method: POST, url: '{url}/x', body: '${{steps.get.output.body}}'}}}}\n\
             output: '${{steps.send.output.body.sha256}}'\n"
        );
        let playbook = db.playbook(company, &yaml).await;
        let run = db.start(company, playbook, json!({})).await;
        Process::worker(&db, &format!("{point}=kill@{hit}")).dies_at(point).await;
        let whole = db.count("select count(*) from artifacts").await;
        assert_eq!(whole == 1, ["artifact.stored", "commit.before"].contains(&point), "{point} {hit}");
        let _survivor = db.worker(SHORT_LEASE);
        let row = db.until(company, run, RunStatus::Completed).await;
        let digest = hex(&sha256(picture()));
        assert_eq!(row.output.unwrap(), json!(digest), "{point} {hit}");
        assert!(fetch(&api, company, &digest, None).await.bytes().await.unwrap() == picture());
        db.assert_nothing_stranded().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_run_gives_may_be_large_too() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let text = "\"x".repeat(75_000);
    for (rest, ends) in [
        ("", RunStatus::Completed),
        ("finally:\n  - {id: close, action: transform}\n", RunStatus::Completed),
        // Its limits count what the output is, not what stands for it.
        ("rubric: {min_items: 3}\n", RunStatus::Failed),
    ] {
        let yaml = format!(
            "name: gives\ninputs: {{text: string}}\nsteps:\n  - {{id: say, action: transform}}\n\
             output: {{items: ['${{inputs.text}}', '${{inputs.text}}'], title: t}}\n{rest}"
        );
        let playbook = db.playbook(company, &yaml).await;
        let run = db.start(company, playbook, json!({"text": text})).await;
        let output = db.until(company, run, ends).await.output.unwrap();
        assert_eq!(output["title"], json!("t"), "{output}");
        let items = reference(&output["items"]);
        let given = fetch(&api, company, &items.sha256, None).await.json::<Value>().await.unwrap();
        assert_eq!(given, json!([text, text]), "{rest}");
        db.assert_nothing_stranded().await;
    }
    let counted = "select count(*) from run_artifacts";
    assert_eq!((db.count(counted).await, db.count("select count(*) from artifacts").await), (3, 1));
}

/// What a run keeps, by its rows.
async fn kept(db: &Db) -> i64 {
    db.count(
        "select ((select coalesce(sum(octet_length(output::text)), 0) from run_steps)
             + (select coalesce(sum(octet_length(output::text)), 0) from run_items))::bigint",
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_keeps_no_more_than_its_limit() {
    let (limit, text) = (32 * 1024 * 1024, "x".repeat(200_000));
    let says = |id: &str| format!("  - {{id: {id}, action: transform, params: {{text: '${{inputs.text}}'}}}}\n");
    let steps: String = (0..170).map(|n| says(&format!("s{n}"))).collect();
    let again = format!("{}  - {{if: 'true', goto: again, max_retries: 300}}\n", says("again"));
    let each = |items: u32| {
        let list: Vec<u32> = (0..items).collect();
        says("each").replace("action:", &format!("for_each: {list:?}, max_items: 1000, max_parallel: 4, action:"))
    };
    for (what, steps, ends) in [
        ("steps", steps, RunStatus::Failed),
        // What is said anew takes the place of what was said before.
        ("a loop", again, RunStatus::Completed),
        ("a list", each(400), RunStatus::Failed),
        ("a list and a step", format!("{}{}", each(160), says("more")), RunStatus::Completed),
        ("a list and steps", format!("{}{}", says("first"), each(170)), RunStatus::Failed),
    ] {
        let db = Db::new().await;
        let _worker = db.worker(SHORT_LEASE);
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, &format!("name: full\ninputs: {{text: string}}\nsteps:\n{steps}")).await;
        let run = db.start(company, playbook, json!({"text": text})).await;
        let row = db.until(company, run, ends).await;
        let bytes = kept(&db).await;
        // Items that were under way when it was full are kept.
        assert!(bytes <= limit + 4 * 200_100, "{what}: {bytes}");
        if ends == RunStatus::Failed {
            let error = row.error.unwrap();
            assert_eq!(error["code"], json!("invalid"), "{what}: {error}");
            assert!(error["message"].as_str().unwrap().contains("over the limit of 33554432"), "{what}: {error}");
            assert!(bytes > limit - 3 * 200_100, "{what}: {bytes}");
            assert!(db.count("select count(*) from run_items").await < 180, "{what}: others were begun");
        }
        // What a list has kept already counts when the rest of it is done.
        if what == "a list" {
            let api = db.api().await;
            let retry = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/retry");
            let (status, answer) = api.post(&retry, json!({})).await;
            assert_eq!(status, 200, "{answer}");
            db.until(company, run, RunStatus::Failed).await;
            let bytes = kept(&db).await;
            assert!(bytes <= limit + 8 * 200_100, "{what}, again: {bytes}");
        }
        db.assert_nothing_stranded().await;
    }
}
