//! Holds every answer that any test gets against the OpenAPI document, and the
//! document against its snapshot and against the router.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::harness::Db;

/// The document, once a process.
static DOCUMENT: OnceLock<Value> = OnceLock::new();

pub fn know(document: &str) {
    DOCUMENT.get_or_init(|| serde_json::from_str(document).unwrap());
}

/// The documented path that a path is an instance of: literals win.
fn template<'a>(document: &'a Value, path: &str) -> Option<&'a str> {
    let path = path.split('?').next().unwrap();
    let given: Vec<&str> = path.split('/').collect();
    let matches = |template: &&String| {
        let parts: Vec<&str> = template.split('/').collect();
        parts.len() == given.len()
            && parts.iter().zip(&given).all(|(part, given)| part.starts_with('{') || part == given)
    };
    let paths = document["paths"].as_object().unwrap();
    paths.keys().filter(matches).min_by_key(|template| template.matches('{').count()).map(String::as_str)
}

/// Fails when an answer is not as the document says.
pub fn check(method: &str, path: &str, status: u16, answer: &Value) {
    static VALIDATORS: OnceLock<Mutex<HashMap<String, Option<Validator>>>> = OnceLock::new();
    let Some(document) = DOCUMENT.get() else { return };
    let Some(template) = template(document, path) else { return };
    let operation = &document["paths"][template][method.to_lowercase()];
    if operation.is_null() {
        return;
    }
    let key = format!("{method} {template} {status}");
    let mut validators =
        VALIDATORS.get_or_init(Mutex::default).lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let validator = validators.entry(key.clone()).or_insert_with(|| {
        let mut response = &operation["responses"][status.to_string()];
        assert!(!response.is_null(), "{key} is not documented");
        if let Some(name) = response["$ref"].as_str() {
            response = &document["components"]["responses"][name.rsplit('/').next().unwrap()];
        }
        let schema = &response["content"]["application/json"]["schema"];
        if schema.is_null() {
            return None;
        }
        let mut root = schema.as_object().unwrap().clone();
        root.insert("components".into(), document["components"].clone());
        Some(jsonschema::draft202012::new(&Value::Object(root)).unwrap())
    });
    if let Some(validator) = validator {
        let faults: Vec<String> =
            validator.iter_errors(answer).map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
        assert!(faults.is_empty(), "{key} answers other than documented: {faults:#?}\n{answer}");
    }
}

/// Fails when an event carries what the document does not say, or lacks what it says.
pub fn check_event(name: &str, data: &Value) {
    let mut schema = capx_core::domain::event::shape::data(name).unwrap_or_else(|| panic!("{name} has no shape"));
    schema["additionalProperties"] = json!(false);
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let faults: Vec<String> =
        validator.iter_errors(data).map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
    assert!(faults.is_empty(), "{name} is other than documented: {faults:#?}\n{data}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_is_as_it_was_reviewed() {
    let db = Db::new().await;
    let api = db.api().await;
    let (status, served) = api.get("/v1/openapi.json").await;
    assert_eq!(status, 200);
    assert_eq!(served["openapi"], "3.1.0");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let text = format!("{}\n", serde_json::to_string_pretty(&served).unwrap());
    if std::env::var("CAPX_WRITE_OPENAPI").is_ok() {
        std::fs::write(&path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stored == text,
        "docs/openapi.json is not what the handlers say; look at the difference, and write it with CAPX_WRITE_OPENAPI=1 cargo test --test it the_document"
    );
}

/// Every resource of the contract, each with its methods; what events in and out
/// need comes with them.
const ROUTES: &str = "
    GET,POST /companies
    GET,PATCH,DELETE /companies/{}
    POST /companies/{}/pause|resume|stop|kill|directives|events
    GET,POST /companies/{}/agents
    GET,PATCH,DELETE /companies/{}/agents/{}
    POST /companies/{}/agents/{}/wake|pause|resume
    GET /companies/{}/agents/{}/logs|heartbeats
    GET,POST /companies/{}/tasks
    GET,PATCH /companies/{}/tasks/{}
    POST /companies/{}/tasks/{}/approve|reject|cancel|retry
    GET /companies/{}/approvals|activity|costs
    GET /companies/{}/costs/daily|costs/forecast
    GET,POST /companies/{}/playbooks
    GET,PATCH,DELETE /companies/{}/playbooks/{}
    POST /companies/{}/playbooks/{}/run|pause|resume|archive|rollback
    GET /companies/{}/playbooks/{}/versions|diff|runs
    GET /companies/{}/playbooks/{}/versions/{}
    GET /companies/{}/playbooks/{}/runs/{}
    POST /companies/{}/playbooks/{}/runs/{}/cancel|replay|retry|events
    GET /approvals|playbooks|activity|activity/stream|costs|workers|queues|jobs|dead-letters
    GET /approvals/{}
    POST /approvals/{}/approve|reject
    POST /playbooks/run|playbooks/validate
    GET /playbooks/{}/runs
    GET,POST /webhooks
    GET,PATCH,DELETE /webhooks/{}
    POST /webhooks/{}/rotate-secret|test
    GET /webhooks/{}/deliveries
    GET /webhooks/{}/deliveries/{}
    POST /webhooks/{}/deliveries/{}/redeliver
    POST /companies/{}/hooks/{}
    POST /queues/{}/pause|resume
    POST /workers/{}/drain
    POST /dead-letters/retry
    POST /dead-letters/{}/retry
    GET,POST /keys
    DELETE /keys/{}
";

#[tokio::test(flavor = "multi_thread")]
async fn every_route_of_the_contract_is_there() {
    let db = Db::new().await;
    let api = db.api().await;
    let (_, document) = api.get("/v1/openapi.json").await;
    let unnamed = |part: &str| if part.starts_with('{') { "{}".to_owned() } else { part.to_owned() };
    let mut served = std::collections::HashSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.trim_start_matches("/v1").split('/').map(unnamed).collect::<Vec<_>>().join("/");
        served.extend(operations.as_object().unwrap().keys().map(|m| format!("{} {path}", m.to_uppercase())));
    }
    for line in ROUTES.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (methods, path) = line.split_once(' ').unwrap();
        let (within, last) = path.rsplit_once("}/").map_or(("", &path[1..]), |(within, last)| (within, last));
        let within = if within.is_empty() { "/".to_owned() } else { format!("{within}}}/") };
        for method in methods.split(',') {
            for last in last.split('|') {
                let wanted = format!("{method} {within}{last}");
                assert!(served.contains(&wanted), "{wanted} is not served");
            }
        }
    }
    let (status, schema) = api.get("/v1/schemas/playbook.json").await;
    assert_eq!((status, &schema["title"]), (200, &serde_json::json!("capx playbook")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reference_needs_nothing_from_outside() {
    let db = Db::new().await;
    let api = db.api().await;
    let (status, page) = api.get("/docs/").await;
    let page = page.as_str().unwrap().to_owned();
    assert!(status == 200 && page.contains("swagger-ui"), "{page}");
    for file in ["swagger-ui-bundle.js", "swagger-ui.css", "swagger-initializer.js"] {
        assert!(page.contains(file));
        assert_eq!(api.get(&format!("/docs/{file}")).await.0, 200, "{file}");
    }
    assert!(!page.contains("http://") && !page.contains("https://"), "{page}");
}

/// Every operation with a value in each place of its path.
pub fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in ["get", "post", "patch", "delete", "put"] {
            if !item[method].is_null() {
                operations.push((method.to_uppercase(), path.clone(), item[method].clone()));
            }
        }
    }
    operations
}

/// The one operation that needs no key: its requests are signed.
pub const OPEN: &str = "/v1/companies/{company}/hooks/{event}";

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_says_its_scope_its_price_and_its_failures() {
    let db = Db::new().await;
    let api = db.api().await;
    let (_, document) = api.get("/v1/openapi.json").await;
    let operations = operations(&document);
    assert!(operations.len() >= 40, "only {}", operations.len());
    for (method, path, operation) in operations {
        if path == OPEN {
            assert_eq!((&operation["security"], &operation["x-scope"]), (&json!([]), &Value::Null), "{method} {path}");
            continue;
        }
        let scope = operation["x-scope"].as_str().unwrap_or_else(|| panic!("{method} {path} has no scope"));
        assert_eq!(operation["security"], json!([{"bearer": [scope]}]), "{method} {path}");
        assert!(operation["x-credits"].as_i64().is_some_and(|credits| credits > 0), "{method} {path}");
        assert!(operation["summary"].is_string() && operation["tags"].is_array(), "{method} {path}");
        for status in ["400", "401", "403", "404", "429", "500", "503"] {
            assert!(!operation["responses"][status].is_null(), "{method} {path} {status}");
        }
    }
}
