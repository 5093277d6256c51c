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

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_says_its_scope_its_price_and_its_failures() {
    let db = Db::new().await;
    let api = db.api().await;
    let (_, document) = api.get("/v1/openapi.json").await;
    let operations = operations(&document);
    assert!(operations.len() >= 40, "only {}", operations.len());
    for (method, path, operation) in operations {
        let scope = operation["x-scope"].as_str().unwrap_or_else(|| panic!("{method} {path} has no scope"));
        assert_eq!(operation["security"], json!([{"bearer": [scope]}]), "{method} {path}");
        assert!(operation["x-credits"].as_i64().is_some_and(|credits| credits > 0), "{method} {path}");
        assert!(operation["summary"].is_string() && operation["tags"].is_array(), "{method} {path}");
        for status in ["400", "401", "403", "404", "429", "500", "503"] {
            assert!(!operation["responses"][status].is_null(), "{method} {path} {status}");
        }
    }
}
